"""Relations between the pixels of feature maps: README.md has the mathematics."""
