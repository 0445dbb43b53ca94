"""What is left of a backdoor after a cleaning, measured with data and the true trigger."""

from dhbe.evaluation.battery.run import Effort, battery

__all__ = ["Effort", "battery"]
