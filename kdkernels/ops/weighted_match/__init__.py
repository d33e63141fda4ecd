"""Weighted differences of two feature maps, sums over their pixels and channels, and the gradients."""
