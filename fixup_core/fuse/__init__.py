"""Scalars that cost nothing: they ride in weights and biases, in training and for good."""
