"""Log-probabilities at k classes a row, and what the other classes hold."""
