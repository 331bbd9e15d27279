"""Scripts that people copy and edit."""
