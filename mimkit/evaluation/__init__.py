"""Evaluation of frozen features: kNN and probes."""
