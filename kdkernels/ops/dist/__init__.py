"""DIST: correlations of the predictions along rows and along columns."""
