"""Conversion of released checkpoints into our networks' layouts, and back to timm's."""
