"""The commands that check, show and export: doctor, data, plan, report, watch, replay, score, export."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from medrlvr_jax.cli.app import (
    INSPECT,
    Config,
    Distributed,
    Flag,
    NonNegativeInteger,
    Paths,
    Penalty,
    Port,
    PositiveInteger,
    Run,
    Settings,
    Step,
    Words,
    command,
    load,
    split_settings,
)
from medrlvr_jax.host.errors import ConfigError


@command(INSPECT)
def doctor(config: str | None = None, /, *settings: Settings) -> int:
    """Check packages, devices, memory and disk. With a config, also check its run.

    Exit status: 0 no problems, 1 problems, 2 invalid input.

    Args:
        config: A config, whose model, data, rewards and checkpoints are checked too.
    """
    checked = load(config, settings) if config else None
    from medrlvr_jax.tools.doctor import report

    lines, ok = report(checked)
    print("\n".join(lines))
    return 0 if ok else 1


@command(INSPECT)
def data(config: Config, /, *settings: Settings, prompts: NonNegativeInteger = 2) -> int:
    """Show how the data sets of a config are read and what the prompts look like.

    For the training set and each set of eval.sets it shows the number of
    questions, the distribution of right letters, repeats, records that were
    not read, prompt lengths in tokens, the number of dropped prompts, and the
    first prompts with all special tokens. It loads no weights.

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
    questions: PositiveInteger | None = None,
    json: Flag = False,
) -> int:
    """Predict whether a training fits on a machine, and how fast it can be.

    It compiles every program of a training step with that machine's compiler,
    from shapes only. It needs no accelerator, no weights and no network.

        medrlvr plan configs/medqa_ppo_qwen2.5_3b.yaml --topology v5e:4x4

    Exit status: 0 it fits, 2 invalid input, 3 it does not fit.

    Args:
        topology: The machine: v5e:4x4, v5p:4x4x4, v6e:8x8, l4:1, h200:8. h100:2x8 has 2 nodes of 8 GPUs.
        sweep: Try up to N combinations of mesh, micro-batch and remat. N is 8 if no number is given.
        quick: Compile faster, with less optimisation. Memory is approximate, and times are too high.
        questions: Size of the training set, to predict the length of the training if the set is not here.
        json: Print all results as one JSON object.
    """
    sizes, overrides = split_settings(sweep, settings)
    if len(sizes) > 1 or not all(size.isdecimal() for size in sizes):
        raise ConfigError(f"--sweep: {' '.join(sizes)} must be one integer, such as --sweep 8")
    attempts = 0 if sweep is None else int((sizes or ["8"])[0])
    checked = load(config, overrides, "plan")
    from medrlvr_jax.plan.plan import run

    return run(checked, topology, attempts, json, questions, quick)


@command(INSPECT)
def report(*runs: Paths, out: Path = Path("report.html")) -> int:
    """Write a page on one or more runs: accuracies, curves, alarms, samples.

    The page is one self-contained HTML file. It also shows the answers of two
    evaluations side by side. Runs that differ only in the seed share a curve
    with a band. The runs need not be finished. A finished run already has its
    page in RUN/report.html.

    Args:
        runs: Folders of runs or of evaluations. Evaluations are shown as bars.
        out: The file to write: .html for the page, or .png for a picture of the curves.
    """
    if out.suffix not in (".html", ".png"):
        raise ConfigError(f"--out: {out} must end in .html for the page, or in .png for the curves")
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
def watch(*runs: Paths, host: str = "127.0.0.1", port: Port = 8787) -> int:
    """Serve the report page of runs and update it while they train.

    The page of `medrlvr report` shows only the named runs, and nothing can be
    changed from it. A run that has not started yet appears once it starts.
    Press Ctrl-C to stop. To see the page of a remote machine:
        ssh -L 8787:127.0.0.1:8787 HOST

    Args:
        runs: Folders of runs or of evaluations.
        host: The address to serve on. With the default only this machine can read the page.
        port: The port. 0 selects a free one.
    """
    from medrlvr_jax.report.watch import server

    with server(list(runs), host, port) as serving:
        print(f"http://{host}:{serving.server_port}/  (press Ctrl-C to stop)", flush=True)
        for run in runs:
            if not run.exists():
                print(f"{run} does not exist yet; the page will show it once it starts", flush=True)
        serving.serve_forever()
    return 0


@command(INSPECT)
def replay(run: Run, /, *settings: Settings, step: PositiveInteger, row: NonNegativeInteger) -> int:
    """Sample a completion of a run again and compare it with the log.

    The noise of a completion depends only on seed, step, question and sample,
    so it can be sampled again from checkpoint STEP - 1, or from the initial
    model for step 1. If that checkpoint was not kept, the steps after the
    newest earlier one are trained again first, which takes as long as before.
    Nothing is written.

    On the machine and mesh of the run the result is bitwise equal. Elsewhere
    rounding may change a token. Override only mesh.* here.

    Exit status: 0 equal to the log or not logged, 1 different.

    Args:
        step: The step, as in samples.jsonl: 1, 2, …
        row: The row, as in samples.jsonl. Rows that were not logged can be sampled too.
    """
    from medrlvr_jax.host.tables import say
    from medrlvr_jax.tools.replay import format_result
    from medrlvr_jax.tools.replay import replay as replay_run

    result = replay_run(run, step, row, list(settings))
    say(format_result(result))
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
    """Score the completions in a file, to test a reward.

    A line of FILE is
        {"completion": "…", "answer": "C", "options": ["…", …]}
    or, for an open question in the data format `open`,
        {"completion": "…", "kind": "number", "answer": 5.2}

    Args:
        file: The JSONL file of completions.
        out: The JSONL file to write, with a reward for each completion.
        reward: The name of a preset, such as ehrmind, or a list of components. Default: Med-RLVR's rule.
        mode: The required format, as in reward.mode. direct: an answer without reasoning.
        prefill: The start of each completion that was part of the prompt, such as '<think>'.
        leak_penalty: Subtracted if the reasoning states the answer. 0.5 in arXiv 2509.15557.
        before_penalty: Subtracted if more than 15 words are before <think>. 0.3 in arXiv 2509.15557.
    """
    settings = [f"reward={reward}"] if reward else []
    settings += [f"reward.mode={mode}"]
    for kind, weight in (("leak", leak_penalty), ("before", before_penalty)):
        settings += [f"reward.{kind}_penalty={weight}"] if weight else []
    tree = {"name": "score", "model": {"path": ""}, "prompt": {"template": "none"}}
    rule = load(tree, settings, "score").reward
    from medrlvr_jax.rewards.parse import graded_prefix
    from medrlvr_jax.tools.score_file import format_counts, score_file

    reasons = score_file(file, out, rule, prefill=graded_prefix(prefill, mode))
    print(format_counts(reasons))
    print(f"scored {reasons.total():,} completions by {reward or 'the rule'} in mode {mode}: {out}")
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
    """Export a run's model as a Hugging Face directory with a model card.

    Args:
        out: The directory to write.
        dtype: The dtype of the weights. Default: the dtype of the base model.
        adapter: Write only the LoRA adapters of a run with model.lora, in PEFT's format.
        push_to_hub: Upload the directory to this hub repository, USER/NAME. A new repository is private.
    """
    from medrlvr_jax.tools.export import export

    export(run, out, step, dtype, adapter, push_to_hub)
    return 0
