"""`timings/gpu.sh` on the CPU, in its smallest setting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_all_records_are_made_and_none_twice(tmp_path):
    def run():
        here = {name: value for name, value in os.environ.items() if name != "DHBE_DATA"}
        here |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = ["bash", str(ROOT / "timings" / "gpu.sh"), str(tmp_path), "--smallest"]
        return subprocess.run(command, env=here, capture_output=True, text=True, check=False)

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    made = {str(path.relative_to(tmp_path)): path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert set(made) >= {
        "doctor.json", "iteration_resnet8_official_fp32.json", "memory_resnet8_fp32.json", "erase_badnets-3_official/record.json",
    }  # fmt: skip
    again = run()
    assert (again.returncode, again.stdout) == (0, "")
    assert {str(path.relative_to(tmp_path)): path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == made
