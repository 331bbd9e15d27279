"""A small real data set: see make.py."""
