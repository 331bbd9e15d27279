"""Checks before a run, and the health of a finished run."""
