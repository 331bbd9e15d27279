"""Weights on disk, on the Hugging Face hub, and in other formats."""
