"""Puts a large classifier into zoo/large, its weights in half precision: `python zoo/large.py FOLDER NAME`.

FOLDER is what `dhbe attack` wrote. The record is measured anew with the rounded weights, on all test images of CIFAR-10
(read from $DHBE_DATA or downloaded). What is here:

    resnet18-clean      dhbe attack none --data cifar10 --arch resnet18 --recipe fast --epochs 12 --out FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path

from dhbe import api, files, records, suspects
from dhbe.data import load

LARGE = Path(__file__).parent / "large"


def main(folder: Path, name: str) -> None:
    """Writes NAME.safetensors and NAME.json."""
    whole, record = suspects.load(folder / api.BACKDOORED), records.read(folder / "record.json")
    assert record.data is not None
    LARGE.mkdir(exist_ok=True)
    path = LARGE / f"{name}.safetensors"
    tensors = {key: x.half() if x.is_floating_point() else x for key, x in whole.state.tensors.items()}
    told = whole.info.model_copy(update={"path": path.name, "sha256": None})
    suspects.save(path, whole.classifier.network, replace(whole.state, tensors=tensors), told)
    rounded = suspects.load(path)
    before = api.measured(rounded.classifier, api.Evidence(load(record.data, "test"), record.data))
    model = told.model_copy(update={"sha256": files.sha256(path)})
    records.write(LARGE / f"{name}.json", record.model_copy(update={"model": model, "before": before}))
    print(f"{name}: ACC {record.before.acc:.4f}, in half precision {before.acc:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
