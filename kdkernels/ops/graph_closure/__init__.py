"""Soft shortest paths between all pairs of vertices: README.md has the mathematics."""
