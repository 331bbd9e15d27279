"""Downstream tasks: classification, segmentation, and detection."""
