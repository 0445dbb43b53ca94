"""The notebook in docs/, executed as a reader would."""

import copy
import runpy
from pathlib import Path

NOTEBOOK = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "notebook.py"))


def test_the_notebook_finds_and_erases_what_it_plants():
    notebook = NOTEBOOK["read"]()
    stored = copy.deepcopy(notebook)
    known = NOTEBOOK["executed"](notebook)
    assert known["found"].record.verdict == "backdoored"
    assert known["found"].record.before.signs["suspected_class"] == 9
    record = known["erasure"].record
    assert record.verdict == "erased"
    assert (record.before.asr > 0.9, record.after.asr < 0.1, record.after.acc > record.before.acc - 0.05) == (True,) * 3
    assert known["erasure"]._repr_html_().startswith("<iframe")
    for cell, then in zip(notebook["cells"], stored["cells"], strict=True):
        assert len(cell.get("outputs", ())) == len(then.get("outputs", ())), (
            "python docs/notebook.py stores the outputs"
        )
