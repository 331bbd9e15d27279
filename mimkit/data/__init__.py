"""Data: from any source to deterministic batches."""
