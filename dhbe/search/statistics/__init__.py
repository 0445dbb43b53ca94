"""Evidence of a backdoor that no trigger is sought for: one number a class from each statistic, and what they come to."""

from dhbe.search.statistics.fusion import ACCUSED, CONVICTED, STATISTICS, evidence, fused, rankings

__all__ = ["ACCUSED", "CONVICTED", "STATISTICS", "evidence", "fused", "rankings"]
