"""Squared distances of all pairs of samples, and the match of two distance matrices."""
