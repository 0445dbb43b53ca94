"""Mutated inputs of every kind, read in processes with limits: `python -m tests.fuzz --cases 20000 --seed 1`."""
