"""Multiplying a stored gradient by its upstream gradient, in place."""
