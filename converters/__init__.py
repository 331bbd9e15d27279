"""Checkpoint families: tables and short tensor functions, no I/O."""
