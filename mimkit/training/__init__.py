"""Training runs: directories, checkpoints, distributed engines, and guards."""
