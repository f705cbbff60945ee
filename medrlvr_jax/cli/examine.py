"""The commands that check and show: doctor, data, plan, report, watch, replay, score, export."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from medrlvr_jax.cli.app import (
    INSPECT,
    Config,
    Distributed,
    Flag,
    Paths,
    Penalty,
    Run,
    Settings,
    Step,
    Whole,
    Words,
    apart,
    command,
    load,
)
from medrlvr_jax.host.errors import ConfigError


@command(INSPECT)
def doctor(config: str | None = None, /, *settings: Settings) -> int:
    """Check packages, devices, memory and disk; with a config also its model and run.

    Exit status: 0 all is well, 1 there are problems, 2 unusable input.

    Args:
        config: Also check what this config needs.
    """
    checked = load(config, settings) if config else None
    from medrlvr_jax.tools.doctor import report

    lines, ok = report(checked)
    print("\n".join(lines))
    return 0 if ok else 1


@command(INSPECT)
def data(config: Config, /, *settings: Settings, prompts: Whole = 2) -> int:
    """Show how the sets of a config are read, and what the model is given.

    For the training set and each of eval.sets: number of questions, letters of
    the keys, repeats, what was not read, tokens of the prompts, how many are
    dropped, and the first prompts as the model gets them. Loads no weights.

        medrlvr data quickstart
        medrlvr data CONFIG.yaml data.path=mine.jsonl --prompts 5

    Args:
        prompts: Number of prompts to print for each set.
    """
    checked = load(config, settings, "data")
    from medrlvr_jax.host.tables import say
    from medrlvr_jax.tools.show_data import show_data

    say(show_data(checked, prompts))
    return 0


@command(INSPECT)
def plan(
    config: Config,
    /,
    *settings: Settings,
    topology: Annotated[str, Parameter(metavar="CHIP:SHAPE")],
    sweep: Annotated[Words, Parameter(metavar="N")] = None,
    quick: Flag = False,
    questions: Whole | None = None,
    json: Flag = False,
) -> int:
    """Predict whether a training fits a machine, and how fast it can be.

    Compiles every program of a training step with that machine's compiler,
    from shapes alone: no accelerator, no weights and no network are needed.

        medrlvr plan configs/medqa_ppo_qwen2.5_3b.yaml --topology v5e:4x4

    Exit status: 0 it fits, 3 it does not fit, 2 unusable input.

    Args:
        topology: The machine: v5e:4x4, v5p:4x4x4, v6e:8x8, l4:1, h200:8; h100:2x8 is 2 nodes of 8 GPUs.
        sweep: Try up to N (8) combinations of mesh, micro-batch and remat.
        quick: Compile with least effort: minutes less; memory is near, times are too high.
        questions: Size of the training set, if it is not on this machine: gives the length of the training.
        json: Print everything as one JSON object.
    """
    sizes, every = apart(sweep, settings)
    if len(sizes) > 1 or not all(size.isdecimal() for size in sizes):
        raise ConfigError(f"--sweep: {' '.join(sizes)} must be one whole number, such as --sweep 8")
    attempts = 0 if sweep is None else int((sizes or ["8"])[0])
    checked = load(config, every, "plan")
    from medrlvr_jax.plan.plan import run

    return run(checked, topology, attempts, json, questions, quick)


@command(INSPECT)
def report(*runs: Paths, out: Path = Path("report.html")) -> int:
    """Show one or several runs as a page: accuracies, curves, alarms, samples.

    The page is one self-contained HTML file, with the answers of two
    evaluations side by side. Runs that differ only in their seed are one curve
    with a band. The runs need not be finished. A run that came to its end has
    its page already, in RUN/report.html.

    Args:
        runs: Folders of runs, or of evaluations, which become bars beside the runs.
        out: The page, such as report.html; or OUT.png, the curves as a picture.
    """
    if out.suffix not in (".html", ".png"):
        raise ConfigError(f"--out: {out} must end in .html, for the page, or in .png, for the curves alone")
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"--out: the folder of {out} does not exist; make it first")
    if out.suffix == ".png":
        from medrlvr_jax.report.pictures import curves as write
    else:
        from medrlvr_jax.report.page import write_page as write
    write(list(runs), out)
    print(out)
    return 0


@command(INSPECT)
def watch(*runs: Paths, host: str = "127.0.0.1", port: Whole = 8787) -> int:
    """Show runs as a page in the browser that follows them while they go on.

    Serves the page of `medrlvr report` on this machine, for the named runs
    alone; the page takes no commands. A run that has not begun is awaited.
    Ctrl-C ends it. From a far machine:
        ssh -L 8787:127.0.0.1:8787 HOST

    Args:
        runs: Folders of runs, or of evaluations.
        host: The address to serve on. Others than the default let other machines read the page.
        port: The port; 0 takes a free one.
    """
    from medrlvr_jax.report.watch import server

    with server(list(runs), host, port) as serving:
        print(f"http://{host}:{serving.server_port}/  (Ctrl-C ends it)", flush=True)
        for run in runs:
            if not run.exists():
                print(f"{run} does not exist yet; the page shows it once it begins", flush=True)
        serving.serve_forever()
    return 0


@command(INSPECT)
def replay(run: Run, /, *settings: Settings, step: Whole, row: Whole) -> int:
    """Draw a completion of a run again, and compare it with the log.

    Seed, step, question and sample determine the noise of each completion, so
    it can be drawn again from checkpoint STEP - 1 (for step 1: the start). If
    that was not kept, the steps from the newest earlier checkpoint are trained
    again first, which takes as long as it took then. Nothing is written.

    On the machine and mesh of the run the result is equal to the bit; on
    others, rounding may change a token now and then. Of the settings, change
    only mesh.* here.

    Exit status: 0 it is what was logged, or was not logged; 1 it is not.

    Args:
        step: The step, as in samples.jsonl: 1, 2, …
        row: The row, as in samples.jsonl. Rows that were not logged can be drawn too.
    """
    from medrlvr_jax.host.tables import say
    from medrlvr_jax.tools import replay as again

    result = again.replay(run, step, row, list(settings))
    say(again.show(result))
    return 1 if result["differ"] else 0


@command(INSPECT)
def score(
    file: Path,
    /,
    *,
    out: Path,
    reward: str | None = None,
    mode: Literal["paper", "strict", "direct"] = "strict",
    prefill: str = "",
    leak_penalty: Penalty = 0.0,
    before_penalty: Penalty = 0.0,
) -> int:
    """Score completions in a file by a reward, to test it.

    Args:
        file: JSONL of {"completion": …, "answer": "C", "options": […]}, or of {"completion": …, "kind":
            "number", "answer": 5.2, …} as in the data format `open`.
        out: The JSONL of verdicts to write.
        reward: What is paid, as in a config: a preset's name, such as ehrmind, or a list of components.
            Default: the rule.
        mode: The format, as in reward.mode. `direct` expects an answer without a thought.
        prefill: The beginning of each completion that the prompt gave, such as '<think>'.
        leak_penalty: Subtracted where the thought states the answer; 0.5 is usual.
        before_penalty: Subtracted where more than 15 words stand before <think>; 0.3 is usual.
    """
    settings = [f"reward={reward}"] if reward else []
    settings += [f"reward.mode={mode}"]
    for kind, weight in (("leak", leak_penalty), ("before", before_penalty)):
        settings += [f"reward.{kind}_penalty={weight}"] if weight else []
    tree = {"name": "score", "model": {"path": ""}, "prompt": {"template": "none"}}
    rule = load(tree, settings, "score").reward
    from medrlvr_jax.rewards.parse import graded_prefix
    from medrlvr_jax.tools.score_file import score_file, show

    reasons = score_file(file, out, rule, prefill=graded_prefix(prefill, mode))
    print(show(reasons))
    print(f"{reasons.total():,} completions scored by {reward or 'the rule'}, mode {mode}: {out}")
    return 0


@command(INSPECT)
def export(
    run: Run,
    out: Path,
    /,
    *,
    step: Step = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    adapter: Flag = False,
    push_to_hub: str | None = None,
    distributed: Distributed = False,
) -> int:
    """Write a run's model as a Hugging Face directory, with a model card.

    Args:
        out: The directory to write.
        dtype: The dtype of the weights. Default: that of the base model.
        adapter: Write only the LoRA adapters of a run with model.lora, in PEFT's format.
        push_to_hub: Upload the directory to this repository of the hub, USER/NAME; made private if it is new.
    """
    from medrlvr_jax.tools.export import export

    export(run, out, step, dtype, adapter, push_to_hub)
    return 0
