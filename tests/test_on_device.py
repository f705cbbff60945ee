"""The script for accelerators also runs on a CPU: every section reports, and a failure in one section is
reported and does not stop the others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import quick

HERE = Path(__file__).parent
FAULTS = """
import os, signal, sys, time
import on_device
from on_device import Section

def fine(report, small):
    report(value=1.23456)

def broken(report, small):
    report(value=2.0)
    raise ValueError("a planted fault")

def crashing(report, small):
    os.kill(os.getpid(), signal.SIGKILL)

def endless(report, small):
    report(value=3.0)
    time.sleep(60)

runs = {"broken": broken, "crashing": crashing, "long": fine, "fine": fine, "endless": endless}
given = [Section(name, 100 if name == "long" else 0, run) for name, run in runs.items()]
sys.exit(on_device.main(["--out", sys.argv[1], "--budget", "3"], given))
"""


def run(out: Path, *command) -> tuple[int, dict, str]:
    """Return the exit status, on_device.json and the printed output, with the tests' fast compilation and
    cache.
    """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(HERE.parent / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    env = (
        os.environ
        | cache
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.FLAGS, "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    )
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    log = out / "on_device.log"
    said = done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    return done.returncode, json.loads((out / "on_device.json").read_text())["sections"], said


def test_every_section_reports(tmp_path):
    status, sections, said = run(tmp_path, HERE / "on_device.py", "--small", "--out", tmp_path)
    assert status == 0, said
    assert list(sections) == [
        "machine",
        "parity",
        "gap",
        "embedding",
        "step_tiny",
        "step_tiny_lora",
        "resume",
        "determinism",
    ]
    assert {s["state"] for s in sections.values()} == {"done"} and all(
        s["figures"] for s in sections.values()
    )
    kernels = {row["kernel"]: row for row in sections["parity"]["figures"]}
    kernel_names = {
        "attention.plain",
        "attention.decode",
        "scoring.token_logprobs",
        "model.embed_lookup",
        "AdamW",
        "sample.noise",
    }
    assert kernel_names <= kernels.keys()
    programs = {row["program"]: row for row in sections["step_tiny"]["figures"] if "program" in row}
    assert programs.keys() == {"generate", "assess", "make_experience", "learn_policy"}
    assert (
        programs["generate"]["tokens_per_s"] > 0 and 0 < programs["learn_policy"]["share_of_peak_flops"] < 1
    )
    compiled = [
        row["compiled_meanwhile"] for row in sections["step_tiny"]["figures"] if "compiled_meanwhile" in row
    ]
    assert (
        not compiled[0].keys() & {"jit(generate)", "jit(assess)", "jit(make_experience)", "jit(learn)"}
        and not compiled[1]
    )
    assert any("device_idle" in row for row in sections["step_tiny"]["figures"])
    assert [
        row["equal_to_the_bit"] for name in ("resume", "determinism") for row in sections[name]["figures"]
    ] == [True, True]
    assert "| learn_policy |" in (tmp_path / "on_device.md").read_text()


def test_failures_are_reported_and_other_sections_run(tmp_path):
    status, sections, said = run(tmp_path, "-c", FAULTS, tmp_path)
    assert status == 1
    assert {name: s["state"] for name, s in sections.items()} == {
        "broken": "failed",
        "crashing": "failed",
        "long": "skipped",
        "fine": "done",
        "endless": "stopped",
    }, said
    value, error = sections["broken"]["figures"]
    assert (
        value == {"value": 2.0}
        and "ValueError: a planted fault" in error["error"]
        and "in broken" in error["error"]
    )
    assert sections["crashing"]["why"] == "signal SIGKILL" and "100 s" in sections["long"]["why"]
    assert sections["endless"]["figures"] == [{"value": 3.0}]  # measured before the stop
    lines = [json.loads(line) for line in (tmp_path / "on_device.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines] == ["broken", "broken", "fine", "endless"] and lines[2][
        "value"
    ] == 1.235


def test_sections_without_time_are_skipped(tmp_path):
    status, sections, _ = run(tmp_path, HERE / "on_device.py", "--out", tmp_path, "--budget", "0")
    assert (
        status == 0 and {s["state"] for s in sections.values()} == {"skipped"} and "step_3B_lora" in sections
    )
