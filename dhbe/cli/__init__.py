"""The command line. Each verb calls one function of `dhbe.api`; torch is imported only when a verb needs it."""

from dhbe.cli.entry import VERBS, main

__all__ = ["VERBS", "main"]
