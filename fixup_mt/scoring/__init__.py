"""Averages of checkpoints, and BLEU."""
