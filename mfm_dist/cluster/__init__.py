"""Runs under Slurm: what a ``job`` does next, the ``lease`` of a run folder, and the ``preflight`` of every node."""
