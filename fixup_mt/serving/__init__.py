"""Trained models for other engines: the scalars folded away."""
