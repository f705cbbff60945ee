"""A short run of faults.py: one run that is killed while it writes a checkpoint, compared with an uninterrupted
run.
"""

import subprocess
import sys
from pathlib import Path


def test_a_killed_run_equals_an_uninterrupted_run(tmp_path):
    command = [
        sys.executable,
        Path(__file__).parent / "faults.py",
        "--quick",
        "--only",
        "sft",
        "--kills",
        "1",
        "--seed",
        "8",
        "--out",
        tmp_path,
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL to process 0: [-9]" in done.stdout and "sft-1: equal, bit by bit" in done.stdout, (
        done.stdout
    )
