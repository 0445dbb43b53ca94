"""Mutated inputs of every kind, each read in a process with limits; `python -m tests.fuzz --help` tells of more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = 300


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to limit what a process may take")
def test_no_mutated_input_is_executed_crashes_hangs_or_takes_the_memory():
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(CASES), "--seed", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["read"] + found["refused"] == CASES
    assert found["read"] > CASES // 50  # or the mutations would be too coarse to get anywhere
