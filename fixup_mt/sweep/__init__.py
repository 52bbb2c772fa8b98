"""``python -m fixup_mt sweep``: short trainings over methods, depths and learning rates."""
