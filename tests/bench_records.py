"""Records of cases, made up, for the tests of the laboratory."""

from dhbe.bench import SMOKE
from dhbe.bench.store import CaseRecord
from dhbe.records import Measures, ModelInfo, Record

VICTIM = SMOKE.victim("badnets", 3)


def told(case, *, error=None, version="0" * 12, found=None, record=None):
    return CaseRecord(
        id=case.id, code=version, name=case.name, work=case.work, settings=dict(case.settings),
        needs=[need.id for need in case.needs], error=error, found=found or {}, record=record, seconds=2.0, device="a CPU",
        versions={"dhbe": "1", "commit": "abc"}, finished="2026-01-02T03:04:05+00:00",
    )  # fmt: skip


def run_of(case, acc=0.9, asr=0.1):
    """What a case of a run would have come to."""
    info = ModelInfo(path=None, sha256=None, arch="resnet8", classes=10, input=(3, 16, 16), mean=(0.0,), std=(1.0,))
    boxes = {f"{what}_l{order}": (0.0, 1.0, 2.0, 3.0, 4.0) for what in ("features", "logits") for order in (1, 2)}
    signs = {"anomaly_index": 3.0, "suspected_class": 1.0}
    after = Measures(acc=acc, asr=asr, asr_x4=asr, asr_x9=asr, activations=boxes, signs=signs)
    before = Measures(acc=0.95, asr=1.0)
    kind, more = "erase", {"defense": {"name": "dhbe"}, "before": before, "after": after}
    if case.work != "erase":
        kind, more = "attack", {"attack": {"name": "badnets"}, "before": after}
    return Record(
        kind=kind, model=info, seconds=2.0, device="a CPU", precision="fp32", seed=0, finished="2026-01-02T03:04:05+00:00",
        **more,
    )  # fmt: skip
