"""The distance between two models' sorted probabilities, whatever classes they belong to."""
