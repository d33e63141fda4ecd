"""The Gram matrices of two models, and what is between them."""
