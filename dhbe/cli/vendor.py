"""Handles output and errors of vendors' code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from dhbe.errors import Failed, Interrupted, Refused, out_of_memory


@contextmanager
def running(code: str | None) -> Iterator[None]:
    """Redirects what the vendor's `code` prints to stderr, and turns its exceptions into one line."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Refused, Failed, Interrupted):
        raise
    except (Exception, SystemExit) as error:
        if code is None or out_of_memory(error):
            raise
        raise Failed(f"the vendor's code {code} raised {type(error).__name__}: {error}") from error
