"""Relations of nodes along the edges of a given graph: README.md has the mathematics."""
