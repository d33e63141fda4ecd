"""Rows of two score tensors to a divergence, with temperatures, masks and a hard-label term."""
