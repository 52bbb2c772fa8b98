"""Measurements of networks: depth, gradients and their bounds, paths."""
