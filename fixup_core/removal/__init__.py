"""Norms taken out of trained networks: kinds, leaving, sides, schedule, removal, folding."""
