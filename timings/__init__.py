"""Benchmarks of time and memory. Run from the root: `python -m timings.iteration`."""
