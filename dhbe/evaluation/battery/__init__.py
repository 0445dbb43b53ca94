"""Measures what is left of a backdoor after cleaning, with data and the true trigger."""

from dhbe.evaluation.battery.run import Effort, battery

__all__ = ["Effort", "battery"]
