"""How long things take, and how much memory. Run from the root: `python -m timings.iteration`."""
