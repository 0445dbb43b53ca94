"""The command line. Each verb is one call of `dhbe.api`; torch is loaded only once a verb needs it."""

from dhbe.cli.entry import VERBS, main

__all__ = ["VERBS", "main"]
