"""What is compared with the paper, or decides a setting. Run from the root: `python -m experiments.erasures`."""
