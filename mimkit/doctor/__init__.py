"""Checks before the first step of a pre-training run, and the health of a run."""
