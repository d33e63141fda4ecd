"""The kernel families: one folder each, with reference, kernels, operator and mathematics."""
