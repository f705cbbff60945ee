"""The file of arms, its cells and their processes, and what the table says of them."""

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from size import size
from test_train import TREE, folder, lines, main  # noqa: F401

from medrlvr_jax.evaluation import stats
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.studies import arms, claims, reproduce

CONFIGS = Path(__file__).parent.parent / "configs"
FILE = {
    "name": "three",
    "seeds": [0, 1],
    "common": TREE | {"eval": {"sets": {"inside": {"path": "a.jsonl"}, "outside": {"path": "b.jsonl"}}}},
    "arms": {
        "base": {"by": "eval", "seeds": [0], "settings": {"prompt": {"prefill": "<think>"}}},
        "sft": {"by": "sft", "settings": {"reward": {"mode": "direct"}}},
        "ppo": {"by": "train", "after": "sft", "settings": {"sample": {"samples": 4}}},
        "coin": {"like": "ppo", "settings": {"reward": {"random": 0.5}}},
    },
    "claims": {"sft": "sft", "rl": ["ppo"], "base": "base"},
}


@pytest.fixture
def file(tmp_path):
    def write(**changes):
        (tmp_path / "arms.yaml").write_text(
            yaml.safe_dump(FILE | {"runs": str(tmp_path)} | changes, sort_keys=False)
        )
        return tmp_path / "arms.yaml"

    return write


def changed(arm, **changes):
    return {"arms": FILE["arms"] | {arm: FILE["arms"][arm] | changes}}


def test_cells_are_arms_by_seeds(file, tmp_path):
    experiment, cells = arms.read(file(), ["learn.policy.lr=0.5", "arms.sft.settings.steps=7"])
    assert [c.path.name for c in cells] == ["base-0", "sft-0", "sft-1", "ppo-0", "ppo-1", "coin-0", "coin-1"]
    base, sft, _, ppo, _, coin, other = cells
    assert (
        coin.by,
        coin.config.sample.samples,
        coin.config.reward.random,
        coin.config.seed,
        other.config.seed,
    ) == ("train", 4, 0.5, 0, 1)
    assert (base.config.prompt.prefill, ppo.config.prompt.prefill, sft.config.steps, ppo.config.steps) == (
        "<think>",
        "",
        7,
        2,
    )
    assert {c.config.learn.policy.lr for c in cells} == {0.5}
    assert (
        coin.parent is sft
        and sft.exported
        and ppo.config.model.path == str(tmp_path / "three" / "sft-0" / "hf")
    )
    assert [c[0] for c in sft.commands()] == ["sft", "eval", "export"] and [
        c[0] for c in base.commands()
    ] == ["eval"]
    assert experiment.folder == tmp_path / "three"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed: "),
        (changed("coin", like="pop"), "arms.coin.like: pop: no arm above this one; above are base, sft, ppo"),
        (changed("sft", after="ppo"), "arms.sft.after: ppo: no arm above"),
        (changed("ppo", after="base"), "arms.ppo.after: base is by eval, which trains nothing"),
        (changed("sft", seeds=[0]), "arms.ppo.after: sft has no seed 1"),
        (changed("sft", by=None), "arms.sft.by: missing"),
        (
            changed("sft", by="train", settings={"sample": {"sampels": 1}}),
            "arms.sft: sample.sampels: no such setting",
        ),
        ({"claims": {"sft": "soft", "rl": ["ppo"]}}, "claims.sft: soft: no such arm"),
        ({"common": TREE | {"eval": {}}}, "arms.base: eval.sets: none"),
    ],
)
def test_wrong_files_are_refused(file, changes, said):
    with pytest.raises(ConfigError, match="arms") as e:
        arms.read(file(**changes), [])
    assert said in str(e.value)


COMPARED = {
    "ppo",
    "grpo",
    "sft_answer",
    "base_cot",
    "base_direct",
    "no_think",
    "format_only",
    "random",
    "constant",
}
LOOKING = {"base", "sft_answer", "sft_rationale", "grpo", "counts", "grpo_curated", "sft_text", "grpo_text"}


@pytest.mark.parametrize(
    ("name", "named"),
    [("reproduce_tiny", COMPARED), ("reproduce_3b", COMPARED), ("reproduce_vision", LOOKING)],
)
def test_the_files_of_the_package_are_complete(name, named, capsys):
    experiment, cells = arms.read(CONFIGS / f"{name}.yaml", [])
    seeds = {arm: [c.config.seed for c in cells if c.arm == arm] for arm in experiment.arms}
    few = 2 if name == "reproduce_vision" else 3
    assert {a: s for a, s in seeds.items() if len(s) < few and not a.startswith("base")} == {}
    assert named <= seeds.keys()
    assert main("reproduce", CONFIGS / f"{name}.yaml", "--dry-run", "runs=nowhere") == 0
    assert capsys.readouterr().out.count("to run") == len(cells)


def test_an_arm_may_train_on_the_questions_that_another_counted(file):
    """The counting arm has no evaluation and no row in the table."""
    curated = {"like": "ppo", "after": "counts", "settings": {"data": {"pass_count": {"keep": [1, 7]}}}}
    more = FILE["arms"] | {"counts": {"by": "difficulty", "settings": {}}, "curated": curated}
    more["ppo"] = {"by": "train"}
    experiment, cells = arms.read(file(arms=more), [])
    counts, cell = (next(c for c in cells if c.path.name == name) for name in ("counts-1", "curated-1"))
    assert cell.parent is counts and cell.config.data.pass_count.keep == (1, 7)
    [[command, source, out, path]] = counts.commands()
    assert (command, source, out) == ("difficulty", str(counts.beside(".yaml")), "--out")
    assert path == cell.config.data.pass_count.file and not counts.exported
    counts.counts.parent.mkdir(parents=True)
    counts.counts.with_name("counts.jsonl.part").touch()
    assert not counts.finished
    counts.counts.touch()
    assert counts.finished and claims.conclude(experiment, [counts], 1).startswith("no cell")


def test_a_changed_cell_is_refused_by_name(file):
    _, cells = arms.read(file(), [])
    cells[0].path.parent.mkdir()
    for cell in cells:
        cell.beside(".yaml").write_text(cell.record())
    arms.check_same(arms.read(file(), [])[1])
    with pytest.raises(ConfigError) as e:  # of the arms that start from it, too
        arms.check_same(arms.read(file(), ["arms.sft.settings.steps=3"])[1])
    said = str(e.value).splitlines()[1:]
    assert said[0] == "  sft-0: steps: 2 before, 3 now" and len(said) == 6
    assert said[2] == "  ppo-0: its command, or the run it starts from, has changed"
    for cell in cells:  # as a version wrote it that did not know one of the settings
        text = cell.beside(".yaml").read_text()
        assert "\n  profile: null" in text
        cell.beside(".yaml").write_text(text.replace("\n  profile: null", ""))
    arms.check_same(arms.read(file(), [])[1])
    with pytest.raises(ConfigError, match=r"sft-0: log.profile: None before, \[1, 2\] now"):
        arms.check_same(arms.read(file(), ["log.profile=[1,2]"])[1])
    cells[1].beside(".yaml").unlink()
    cells[1].path.mkdir()
    with pytest.raises(ConfigError, match=r"sft-0: there is no sft-0.yaml beside it"):
        arms.check_same(cells)


def test_each_command_writes_the_file_that_marks_it_as_done(folder, tmp_path):  # noqa: F811
    """Run each command of two cells in this process: fine-tune a random model, export it, train from it."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["eval"]["sets"]["outside"] = {"path": "embedded:in_distribution", "limit": 9}
    some = {"sft": {"by": "sft"}, "ppo": {"by": "train", "after": "sft"}}
    whole = {
        "name": "real",
        "runs": str(tmp_path),
        "seeds": [0],
        "common": tree,
        "arms": some,
        "claims": {"sft": "sft", "rl": ["ppo"]},
    }
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    experiment, cells = arms.read(tmp_path / "real.yaml", [])
    experiment.folder.mkdir()
    for cell in cells:
        cell.beside(".yaml").write_text(cell.record())
        while commands := cell.commands():
            assert main(*commands[0]) == 0 and len(cell.commands()) == len(commands) - 1
    assert all(cell.finished for cell in cells)
    text = claims.conclude(experiment, cells, 3)
    assert (
        text == (experiment.folder / "table.md").read_text() and (experiment.folder / "curves.png").exists()
    )
    table = json.loads((experiment.folder / "table.json").read_text())
    assert table["arms"]["ppo"]["outside"]["n"] == 9 and table["against_sft"]["ppo"]["outside"]["p_holm"] == 1
    assert "format_failure (at most 100 %, step 1)" in text and "2 of 3 cells are finished" in text


PYTHON = sys.executable
FAKE = """#!{python}
import os, sys, time, yaml
from pathlib import Path
command, source = sys.argv[3:5]
with open({log!r}, "a") as file:
    print(command, Path(source).stem, len(os.sched_getaffinity(0)), file=file)
if "{fails}" and "{fails}" in source:
    print("it went wrong")
    sys.exit(1)
try:
    time.sleep({seconds})
except KeyboardInterrupt:
    sys.exit(130)
made = {{"eval": "eval/eval.json", "export": "hf/config.json"}}.get(command, "summary.json")
run = Path(source).with_suffix("") if source.endswith(".yaml") else Path(source)
(run / made).parent.mkdir(parents=True, exist_ok=True)
(run / made).write_text('{{"seconds": 1.0}}')
"""


def fake(tmp_path, monkeypatch, seconds=0.0, fails=""):
    """Replace Python by a program that writes the last file of a command, and a list of its commands."""
    program, asked = tmp_path / "fake", tmp_path / "asked"
    program.write_text(FAKE.format(python=PYTHON, log=str(asked), fails=fails, seconds=seconds))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(reproduce.sys, "executable", str(program))
    asked.write_text("")
    return asked


def test_each_cell_runs_once_and_after_its_parent(file, tmp_path, monkeypatch, capsys):
    asked = fake(tmp_path, monkeypatch)
    _, cells = arms.read(file(), [])
    jobs = min(2, len(os.sched_getaffinity(0)))
    assert reproduce.Runner(cells, jobs).run() == 0
    ran = [line.split() for line in asked.read_text().splitlines()]
    order = [(command, cell) for command, cell, _ in ran]
    assert len(order) == len(set(order)) == 1 + 2 * 3 + 4 * 2 and all(cell.finished for cell in cells)
    assert order.index(("export", "sft-1")) < order.index(("train", "ppo-1")) < order.index(("eval", "ppo-1"))
    assert {int(cores) for *_, cores in ran} == {len(os.sched_getaffinity(0)) // jobs}
    assert "7/7 cells: coin-1 is finished after 0:00:0" in capsys.readouterr().err
    assert main("reproduce", file(), "--dry-run") == 0 and capsys.readouterr().out.count(" finished") == 7


def test_a_failure_is_reported_and_other_cells_continue(file, tmp_path, monkeypatch, capsys):
    fake(tmp_path, monkeypatch, fails="sft-0.yaml")
    monkeypatch.setattr(reproduce.claims, "conclude", lambda _, finished, of: f"{len(finished)} of {of}")
    assert main("reproduce", file(), "--only", "ppo", "base", "learn.policy.lr=0.1") == 1
    done = capsys.readouterr()
    assert (
        "sft-0 failed with exit status 1" in done.err
        and "it went wrong" in done.err
        and "ppo-0 is left out, since sft-0 failed" in done.err
    )
    assert done.out.startswith("3 of 7") and "coin" not in done.err
    assert (
        main("reproduce", file(), "--only", "ppo", "base") == 2
        and "learn.policy.lr: 0.1 before, 0.001 now" in capsys.readouterr().err
    )
    assert (
        main("reproduce", file(), "--only", "pop") == 2
        and "--only: pop: no such arm" in capsys.readouterr().err
    )
    assert (
        main("reproduce", file(), "name=x", "--jobs", "4096") == 2
        and "--jobs: 4096" in capsys.readouterr().err
    )


def test_a_signal_stops_the_cells_and_the_same_command_continues(file, tmp_path, monkeypatch, capsys):
    asked = fake(tmp_path, monkeypatch, seconds=30)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    began = time.monotonic()
    assert main("reproduce", file()) == 130 and time.monotonic() - began < 15
    assert (
        asked.read_text().count("\n") == 1
        and "the same command continues from here" in capsys.readouterr().err
    )
    fake(tmp_path, monkeypatch)
    monkeypatch.setattr(reproduce.claims, "conclude", lambda *_: "")
    assert main("reproduce", file()) == 0


# ---- the table ----


def test_runs_and_questions_are_both_random_by_hand():
    rng = np.random.default_rng(1)
    runs = np.repeat([[0.0, 1.0]], 50, axis=0)  # the runs differ in all, the questions in nothing
    assert stats.mean_share(runs).low < 0.01 and stats.mean_share(runs).high > 0.99
    # 3 questions by 2 runs against a base: differences 1, ½, 0; added: half a 1, half a −1, one 0.
    # Centre 1.5/5, variance (1 + ¼ + 1)/5 − 0.09 = 0.36.
    a = np.array([[1, 1], [1, 0], [0, 0]])
    c = stats.contrast(a, np.zeros((3, 1)), (False, True))
    between, residual = ((2 / 3 - 1 / 3) ** 2) / 2, (4 * (1 / 6) ** 2 + 2 * (1 / 3) ** 2) / 2
    assert (c.value, c.centre) == pytest.approx((0.5, 0.3))
    assert c.error**2 == pytest.approx(0.36 / 4 - residual / 6 + between / 2)
    share = between / 2 / c.error**2
    assert c.freedom == pytest.approx(1 / (share**1.25 / 1 + (1 - share) ** 1.25 / 4))
    t = stats.scipy.stats.t(c.freedom)
    half = t.ppf(0.975) * c.error
    assert (c.low, c.high) == pytest.approx((max(-1, 0.3 - half), min(1, 0.3 + half)))
    assert c.p == pytest.approx(2 * t.sf(0.3 / c.error)) and c.within(0.4) == pytest.approx(
        t.sf(0.1 / c.error)
    )
    a = (rng.random((400, 3)) < 0.5).astype(float)
    same = stats.contrast(a, a)
    assert same.p == 1 and -0.1 < same.low < -0.005 and same.within(0.1) < 0.05 < same.within(0.01)


def test_equal_methods_differ_significantly_in_5_percent():
    """Seeds change a run by 4 points, so a test over questions alone has false positives in 1/3 of cases."""
    for runs in ((3, 3), (1, 3)):
        p, interval, spread = size(runs, 0.2, suits=0.7, trials=1500)
        assert 0.035 <= p <= 0.065 and p == interval and 0.03 < spread < 0.05


def answered(cell, name, right, hashes=str, **more):
    """Write an evaluation of a cell in which question i is answered right if `right[i]`."""
    (cell.path / "eval").mkdir(parents=True, exist_ok=True)
    (cell.path / "eval" / "eval.json").write_text(
        json.dumps(
            {"versions": {"git": None}, "eval": {"inside": {"n": 100, "dropped_prompts": 20, "truncated": 3}}}
        )
    )
    row = {
        "key": "A",
        "options": 4,
        "format_ok": True,
        "length": 5,
        "stage": "reintegrated_reasoning",
        "sample": 0,
    } | more
    rows = [
        row | {"id": f"q{i}", "question_hash": hashes(i), "correct": bool(x), "answer": "A" if x else "B"}
        for i, x in enumerate(right)
    ]
    (cell.path / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_the_table_by_hand(file):
    experiment, cells = arms.read(file(), [])
    wanted = [c for c in cells if c.arm in ("base", "sft", "ppo")]
    n = np.arange(100)
    for cell in wanted:
        unseen = {"blank": 0.25, "shuffled": 0.125, "none": 0.5}
        answered(cell, "inside", n < {"base": 20, "sft": 50, "ppo": 50}[cell.arm], unseen=unseen)
        answered(cell, "outside", n < {"base": 20, "sft": 20, "ppo": 60 + 10 * cell.config.seed}[cell.arm])
        stages = {f"stage/{s}": 0.0 for s in claims.STAGES} | {
            "stage/format_failure": 0.75,
            "stage/direct_answer_hacker": 0.25,
        }
        (cell.path / "metrics.jsonl").write_text(json.dumps({"step": 1} | stages) + "\n")
    text = claims.conclude(experiment, wanted, len(cells))
    table = json.loads((experiment.folder / "table.json").read_text())
    ppo = table["arms"]["ppo"]["outside"]
    assert (ppo["accuracy"]["value"], ppo["by_seed"], ppo["seeds"]) == (0.65, [0.6, 0.7], [0, 1])
    against = table["against_sft"]["ppo"]
    inside = against["inside"]
    assert (
        inside["difference"]["value"] == 0
        and inside["difference"]["high"] == -inside["difference"]["low"] > 0.019
    )
    assert inside["p"] == inside["p_holm"] == 1 and inside["p_margin"] < 0.05 and inside["n"] == 100
    assert (
        against["outside"]["difference"]["value"] == pytest.approx(0.45)
        and against["outside"]["p_holm"] < 0.01
    )
    assert set(table["against_sft"]["base"]) == {"inside", "outside"} and table["against_sft"]["sft"] == {}
    match = "no significant difference; the two match: a difference of 5 points or more is ruled out"
    assert f"p 1, with Holm's adjustment 1: {match}" in text
    assert "ppo − sft on outside: +45.0" in text and ": ppo is higher." in text
    assert "thoughts show inference in 100.0 % of answers on inside (100.0 % of base's)" in text
    assert (
        "2 of 6 reached 10 % of a step's completions: format_failure (at most 75 %, step 1), direct_answer_hacker (at most 25 %"
        in text
    )
    assert text.count("\ninside: 20 of 120 questions dropped") == 1 and "cut off" not in text
    assert "5 of 7 cells are finished" in text and "| ppo | 2 |" in text
    looks = table["arms"]["ppo"]["inside"]["looks"]  # the larger of the two is subtracted
    assert looks["value"] == 0.25 and 0.13 < looks["low"] < 0.17 and 0.33 < looks["high"] < 0.37
    assert ppo["looks"] is None and "inside: looks" in text and "outside: looks" not in text
    answered(wanted[1], "inside", n[:50] < 5)
    with pytest.raises(ConfigError, match="other questions than in"):
        claims.conclude(experiment, wanted, len(cells))


def test_arms_may_have_other_sets_and_other_questions(file):
    """A set of one arm is in its row alone. Questions that SFT did not answer, or with another hash, are not
    paired.
    """
    more = {"eval": {"sets": {"extra": {"path": "c.jsonl"}}}}
    experiment, cells = arms.read(file(**changed("ppo", settings={"sample": {"samples": 4}} | more)), [])
    wanted = [c for c in cells if c.arm in ("sft", "ppo")]
    n = np.arange(40)
    for cell in wanted:
        for name in cell.config.eval.sets:
            answered(
                cell,
                name,
                n[: 40 if cell.arm == "sft" else 20] < 20,
                lambda i, arm=cell.arm: f"{arm}" if i < 5 else "same",
            )
        (cell.path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    text = claims.conclude(experiment, wanted, len(cells))
    assert (
        "extra: accuracy" in text
        and "100.0 % (" in text
        and "ppo on inside: compared on the 15 of its 20 questions" in text
    )
    table = json.loads((experiment.folder / "table.json").read_text())
    assert table["against_sft"]["ppo"]["inside"]["n"] == 15 and set(table["against_sft"]["ppo"]) == {
        "inside",
        "outside",
    }


@pytest.mark.parametrize(
    ("value", "p", "p_holm", "p_margin", "said"),
    [
        (0.2, 0.001, 0.01, 0.9, "ppo is higher"),
        (
            -0.02,
            0.02,
            0.2,
            0.03,
            "ppo is lower if this is the only test, but not among the 9 of the table; the two match",
        ),
        (
            0.01,
            0.5,
            1.0,
            0.2,
            "no significant difference, and no match shown: a difference of 5 points is not ruled out (p 0.2)",
        ),
    ],
)
def test_the_verdict_follows_from_the_p_values(value, p, p_holm, p_margin, said):
    test = {
        "difference": stats.Interval(value, value, value),
        "p": p,
        "p_holm": p_holm,
        "p_margin": p_margin,
        "over": "questions and seeds",
    }
    assert claims.verdict("ppo", test, 9, 0.05).startswith(said)


def test_nothing_is_finished(file):
    experiment, cells = arms.read(file(), [])
    assert "there is no table yet" in claims.conclude(experiment, [], len(cells))
