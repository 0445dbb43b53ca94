"""Evidence of a backdoor without trigger inversion: one number per class from each statistic, and their fusion."""

from dhbe.search.statistics.fusion import ACCUSED, CONVICTED, STATISTICS, evidence, fused, rankings

__all__ = ["ACCUSED", "CONVICTED", "STATISTICS", "evidence", "fused", "rankings"]
