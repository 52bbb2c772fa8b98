"""Attacks on both halves, run by ``make campaign``; each script closes with one figure.

Every trial is a process of its own, forked from one that has imported everything already: the
command starts at once, and can be killed. ``--count`` says how many trials, ``--seed`` which.
"""
