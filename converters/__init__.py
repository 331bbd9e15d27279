"""Checkpoint families, one per module: tables of names and short tensor functions, without file access.

A module becomes the family of its name by defining FAMILY, a `Family` of `mimkit/conversion/family.py`. `mimkit convert
--layout NAME` selects it. docs/converting.md shows how to add one.
"""
