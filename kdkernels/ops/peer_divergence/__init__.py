"""Divergences between the members of a group of models, every ordered pair at once."""
