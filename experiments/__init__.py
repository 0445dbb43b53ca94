"""Code that needs this clone: experiments on `zoo/` and third-party models, and tables of records made before `dhbe bench`.

A file that defines EXPERIMENT runs by `dhbe bench run experiments/NAME.py`; one with `tables` draws what pages show,
which `dhbe bench show --check` compares.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
