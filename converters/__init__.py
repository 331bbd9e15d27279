"""Checkpoint families, one per module: tables of names and short tensor functions, without file access.

A module becomes the family of its name by defining FAMILY. `mimkit convert --layout NAME` selects it.
"""
