"""A run's files are complete after any crash and have each step once. A folder has one process and one set of
settings.
"""

import errno
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medrlvr_jax.config.load import from_tree, load
from medrlvr_jax.data.question import Question
from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError, Unwritable
from medrlvr_jax.runs import log
from medrlvr_jax.runs.console import Console

ROOT = Path(__file__).parents[1]


def config(tmp_path, **changes):
    tree = {
        "name": "run",
        "runs": str(tmp_path),
        "steps": 3,
        "model": {"path": "embedded"},
        "data": {"path": "embedded:train"},
        "learn": {"policy": {"lr": 1e-4}, "critic": {"lr": 1e-3}},
    }
    return from_tree(tree | changes)


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.append(
        path,
        [{"step": 1, "a": np.float32(0.5), "b": math.nan, "c": [np.inf, 1], "d": "β\n", "e": np.arange(2)}],
    )
    files.append(path, [])
    files.append(path, [{"step": 2}, {"step": 3}])
    assert files.read_jsonl(path) == [
        {"step": 1, "a": 0.5, "b": None, "c": [None, 1], "d": "β\n", "e": [0, 1]},
        {"step": 2},
        {"step": 3},
    ]


@pytest.mark.parametrize("torn", ["", '{"step": 5, "rew', '{"step": 4}'])
def test_rewind_leaves_each_step_once(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    files.append(path, [{"step": k} for k in (0, 1, 2, 2, 3, 4)])
    with open(path, "a") as file:
        file.write(torn)
    # a reader of a running run does without the torn line
    assert [r["step"] for r in files.read_jsonl(path)] == [0, 1, 2, 2, 3, 4]
    files.rewind(path, 3)
    files.append(path, [{"step": 4}])
    assert [r["step"] for r in files.read_jsonl(path)] == [0, 1, 2, 2, 3, 4]
    files.rewind(path, 0)
    assert path.read_text() == "" and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_rewind_survives_a_torn_character(tmp_path):
    path = tmp_path / "samples.jsonl"
    files.append(path, [{"step": 1, "completion": "β"}])
    with open(path, "ab") as file:
        file.write('{"step": 2, "completion": "β'.encode()[:-1])
    files.rewind(path, 1)
    assert files.read_jsonl(path) == [{"step": 1, "completion": "β"}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: cannot be read: JSONDecodeError"):
        files.rewind(path, 3)
    assert path.read_text().count("\n") == 3


def test_a_run_writes_its_records_and_summary(tmp_path):
    c = config(tmp_path)
    counts = {"n": 10, "correct": 3, "format_ok": 9}
    with log.Run(c, 2) as run:
        run.resume(0)
        run.record(0, {f"eval.dev.set.{k}": v for k, v in counts.items()})
        run.record(
            1,
            {"reward": -0.5, "seconds": 2.0, "tokens": 100},
            samples=[{"completion": "a"}, {"completion": "b"}],
        )
        run.record(
            2, {"reward": 0.5, "seconds": 2.0} | {f"eval.dev.set.{k}": v + 1 for k, v in counts.items()}
        )
        summary = run.finish()
    assert load(run.path / "config.yaml") == c
    records = files.read_jsonl(run.path / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2] and records[1]["tokens_per_second"] == 50
    assert files.read_jsonl(run.path / "samples.jsonl") == [
        {"step": 1, "completion": "a"},
        {"step": 1, "completion": "b"},
    ]
    assert summary["eval"] == {"dev.set": {"before": counts, "after": {k: v + 1 for k, v in counts.items()}}}
    written = json.loads((run.path / "summary.json").read_text())
    assert (
        written["eval"] == summary["eval"]
        and written["last"]["reward"] == 0.5
        and written["config"]["steps"] == 3
    )
    assert written["versions"]["jax"] and set(written["versions"]["git"] or {"revision", "dirty"}) == {
        "revision",
        "dirty",
    }


def test_resume_removes_the_records_after_the_checkpoint(tmp_path):
    for done, steps in ((0, range(1, 6)), (3, range(4, 7)), (0, range(1, 3))):
        with log.Run(config(tmp_path), 9) as run:
            run.resume(done)
            for k in steps:
                run.record(k, {"reward": 0.0}, samples=[{"completion": "x"}], questions=[{}])
        for name in ("metrics.jsonl", "samples.jsonl", "questions.jsonl"):
            assert [r["step"] for r in files.read_jsonl(run.path / name)] == list(range(1, steps[-1] + 1))


def test_answers_are_spread_over_the_set_and_resume_removes_later_ones(tmp_path):
    """Images of questions are written once, in the first evaluation."""
    film = io.BytesIO()
    Image.new("L", (9, 9)).save(film, "PNG")
    rows = [{"id": str(i), "sample": k} for i in range(9) for k in (0, 1)]
    asked = [Question(str(i), "?", ("a", "b"), 0, images=(film.getvalue(),) * (i == 4)) for i in range(9)]
    for done, steps, left in ((0, (0, 2, 4), {"0", "2", "4"}), (2, (), {"0", "2"}), (0, (0,), {"0"})):
        with log.Run(config(tmp_path, log={"answers": 3}), 9) as run:
            run.resume(done)
            for step in steps:
                run.write_answers(step, "dev", rows, asked)
                run.record(step, {})
        assert {folder.name for folder in (run.path / "answers").iterdir()} == left
        for step in left:
            answers = files.read_jsonl(run.path / "answers" / step / "dev.jsonl")
            images = answers[1].pop("images", [])
            assert [image[:15] for image in images] == ["data:image/jpeg"] * (step == "0")
            assert answers == [{"id": i, "sample": 0} for i in ("0", "4", "8")]


def test_other_settings_are_refused_and_named(tmp_path):
    with log.Run(config(tmp_path), 3):
        pass
    changed = config(
        tmp_path, steps=5, seed=3, mesh={"fsdp": 2}, checkpoint={"keep": 7}, model={"path": "elsewhere"}
    )
    with pytest.raises(ConfigError) as e:
        log.Run(changed, 5)
    message = str(e.value)
    assert (
        "model.path: 'embedded' before, 'elsewhere' now" in message
        and "seed: 0 before, 3 now" in message
        and "another name=" in message
    )
    assert not any(f"  {name}" in message for name in ("steps", "mesh", "checkpoint"))
    with log.Run(config(tmp_path, steps=5), 5) as run:  # and the refusal gave the lock back
        assert load(run.path / "config.yaml").steps == 5


def test_a_run_from_before_a_setting_existed_resumes_with_its_default(tmp_path):
    with log.Run(config(tmp_path), 3) as run:
        pass
    file = run.path / "config.yaml"
    old = file.read_text().replace("  max_batches: 1\n", "")
    assert old.count("\n") == file.read_text().count("\n") - 1
    file.write_text(old)
    with log.Run(config(tmp_path), 3):
        pass
    file.write_text(old)
    with pytest.raises(ConfigError, match=r"sample.max_batches: 1 before, 2 now"):
        log.Run(config(tmp_path, sample={"max_batches": 2}, advantage={"drop_equal_groups": True}), 3)


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from medrlvr_jax.runs.log import _take_lock;"
        "lock = _take_lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    (tmp_path / "run").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=rf"run is in use by process {other.pid} on .*another name="):
        log.Run(config(tmp_path), 3)
    assert f"process {other.pid}" in log.lock_holder(tmp_path / "run")
    other.kill()
    other.wait()
    assert log.lock_holder(tmp_path / "run") is None
    with log.Run(config(tmp_path), 3):
        pass


def test_a_full_disk_is_reported_and_written_files_remain(tmp_path):
    with log.Run(config(tmp_path), 3) as run:
        run.resume(0)
        run.record(1, {"reward": 0.0})
        before = (run.path / "metrics.jsonl").read_text()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        # a write beyond fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limit[1]))
        try:
            with pytest.raises(
                Unwritable,
                match=r"metrics\.jsonl cannot be written: .*; solve that, and run the same command again",
            ):
                run.record(2, {"reward": 0.0})
            with pytest.raises(Unwritable, match=r"summary\.json cannot be written"):
                files.write_json(run.path / "summary.json", ["long"] * 99)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert not list(run.path.glob("*.tmp")) and not list(run.path.glob(".*.tmp"))
        assert files.read_jsonl(run.path / "metrics.jsonl") == [{"step": 1, "reward": 0.0}]
        run.resume(1)
        assert (run.path / "metrics.jsonl").read_text() == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)  # permissions do not bind root, who may run the tests
    with pytest.raises(Unwritable, match="run cannot be written: Read-only file system"):
        log.Run(config(tmp_path), 3)


def test_skipped_steps_are_counted_over_a_restart(tmp_path):
    with log.Run(config(tmp_path), 9) as run:
        assert run.resume(0) == 0
        for step, skipped in enumerate([1, 0, 1, 1], 1):
            run.record(step, {"policy/skipped": skipped})
        assert [run.resume(done) for done in (4, 3, 2, 1)] == [2, 1, 0, 1]


def test_the_first_signal_ends_the_step_and_the_second_kills(tmp_path, capsys):
    # a shell's background job begins with it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.Run(config(tmp_path), 3) as run:
        run.resume(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not run.stopping  # not until the step is recorded
        run.record(1, {"reward": 0.0})
        assert run.stopping
        assert run.finish() == {"name": "run", "steps": 3, "done": 1, "exit_status": 128 + signal.SIGTERM}
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert not (run.path / "summary.json").exists()
        run.record(3, {"reward": 0.0})
        assert run.finish()["steps"] == 3  # it was the last step: the run is complete
    said = capsys.readouterr().err
    assert "SIGTERM: the run will finish the current step, save and stop" in said
    assert "run has stopped: step 1 of 3 is saved. The same command resumes the run." in said


def test_console_prints_a_line_per_step_without_a_terminal():
    file = io.StringIO()
    console = Console(400, file)
    console.step(0, {"eval.dev.n": 4, "eval.dev.correct": 1, "eval.dev.format_ok": 2})
    console.notify("7 questions dropped [too long]")
    for step in (1, 2, 3):
        console.step(
            step,
            {
                "seconds": 90.0 if step == 1 else 3.0,
                "tokens_per_second": 1834.2,
                "reward": math.nan,
                "accuracy": 0.481,
                "kl": None,
            },
        )
    console.close()
    first, notice, slow, second, last = file.getvalue().splitlines()
    # a step that was slow once does not tell of the rest
    assert "9:58:30 left" in slow and "0:19:54 left" in second
    assert first == "step 0/400  eval dev: correct 1/4, format 2/4"
    assert notice == "7 questions dropped [too long]"
    assert last == "step 3/400  1 %  0:19:51 left  reward +nan  correct 48.1%  3.00 s  1,834 tok/s"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_always_shows_step_percentage_and_time_left(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    terminal, metrics = Terminal(), {"seconds": 3.0, "reward": 0.5, "accuracy": 0.481, "format_ok": 1.0}
    console = Console(400, terminal)
    console.begin(100)
    console.notify("going on")
    for step in range(101, 141):
        console.step(step, metrics | {"kl": 0.1, "response_length": 99, "tokens_per_second": 1234})
    console.progress("eval dev", 3, 9, "a program")
    console.notify("end")
    assert terminal.getvalue().endswith("\r")  # what C++ writes next does not follow the last line
    console.close()
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= columns
    assert any(line.startswith("step 100/400  25 %") for line in lines)  # it begins where it goes on
    assert any(line.startswith("step 140/400  35 %  0:13:00 left  0:00:00  eval dev") for line in lines)
    assert not any(
        re.search(r"(correct|format|KL|length) [\d.]*…", line) for line in lines
    )  # whole numbers only
    # what is not written over: every 20th step of 400
    assert re.findall(r"step (\d+)/400[^\r\n]*reward[^\r\n]*\n", terminal.getvalue()) == ["120", "140"]


def test_tensorboard_gets_metrics_and_missing_packages_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    with log.Run(config(tmp_path, log={"tensorboard": True}), 3) as run:
        run.resume(0)
        run.record(1, {"reward": 0.5, "kl": None, "policy/clip_fraction": 0.1})
    [events] = (run.path / "tensorboard").iterdir()
    wanted = (b"policy/clip_fraction", b"train/reward", b"_hparams_/session_start_info", b"learn.policy.lr")
    assert all(name in events.read_bytes() for name in wanted)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for settings, extra in (({"tensorboard": True}, "tensorboard"), ({"wandb": "project"}, "wandb")):
        with (
            pytest.raises(ConfigError, match=rf"log\.{extra}.*medrlvr-jax\[{extra}\]"),
        ):
            log.check(config(tmp_path, log=settings), "train")


def test_wandb_gets_settings_and_metrics(tmp_path, monkeypatch):
    calls = []

    class Fake:
        def init(self, **kwargs):
            calls.append(kwargs)
            return self

        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self, exit_code):
            calls.append(f"exit {exit_code}")

    monkeypatch.setitem(sys.modules, "wandb", Fake())
    with log.Run(config(tmp_path, log={"wandb": "medicine"}), 3) as run:
        run.resume(0)
        run.record(1, {"reward": 0.5})
    assert calls[0]["project"] == "medicine" and calls[0]["config"]["seed"] == 0
    assert calls[1:] == [(1, {"train/reward": 0.5}), "exit 0"]
    with pytest.raises(Unwritable), log.Run(config(tmp_path, log={"wandb": "medicine"}), 3) as run:
        run.resume(0)
        raise Unwritable("the disk is full")
    assert calls.pop() == "exit 1" and calls.pop()
    # going on is the same run there, one of its name in another folder is not
    for place in (tmp_path, tmp_path, tmp_path / "elsewhere"):
        with log.Run(config(place, log={"wandb": "medicine"}), 3) as run:
            run.resume(0)
    first, again, _, other = [call["id"] for call in calls if isinstance(call, dict)]
    assert len(first) == 32 and first == again != other


def test_wandb_without_a_login_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    c = config(tmp_path, log={"wandb": "medicine"})
    with pytest.raises(ConfigError, match=r"log\.wandb: medicine needs a login.*wandb login"):
        log.check(c, "train")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key")
    log.check(c, "train")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.hospital.example")
    with pytest.raises(ConfigError, match="needs a login"):
        log.check(c, "train")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log.check(c, "train")


def test_long_work_prints_its_progress(monkeypatch):
    now, file = [0.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(10, file)
    for done in range(1, 11):
        now[0] += 10
        console.progress("eval dev", done, 10)
    assert file.getvalue().splitlines() == ["eval dev  4/10", "eval dev  8/10"]


def test_texts_are_printed_unchanged(capsys):
    """rich does not turn `:name:` into an emoji or `[b]` into markup, and control characters are escaped."""
    text, file = "of :pill: [b]\x1b[2J\r\x9b", io.StringIO()
    shown = r"of :pill: [b]\x1b[2J\x0d\x9b"
    tables.say(text)
    assert capsys.readouterr().out == f"{shown}\n"
    assert shown in tables.plain(("subject", "n"), [(text, "1")])
    Console(0, file).notify(text)
    assert file.getvalue() == f"{shown}\n"
