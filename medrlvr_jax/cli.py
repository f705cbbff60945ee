"""The command line: `medrlvr COMMAND …`, the same as `python -m medrlvr_jax COMMAND …`.

Each command is a typed function: cyclopts makes its parser and its help from the signature and the docstring.
A command imports what brings JAX when it runs, so that `--help` and a refusal come at once. `main` runs one
command, and is the one place where errors become exit statuses.
"""

import inspect
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Group, Parameter
from cyclopts.validators import Number

import medrlvr_jax
from medrlvr_jax.config import check, describe
from medrlvr_jax.config.load import load
from medrlvr_jax.host import environment
from medrlvr_jax.host.errors import ConfigError, MedrlvrError
from medrlvr_jax.host.files import write_json
from medrlvr_jax.runs.console import stage

TRAIN, EVALUATE, INSPECT, HELP = map(Group.create_ordered, ("Train", "Evaluate", "Check and inspect", "Help"))
app = App(
    name="medrlvr",
    help="""Reinforcement learning from verifiable rewards on medical questions, in JAX.

    First run:         medrlvr train configs/quickstart.yaml
    Change a setting:  medrlvr train configs/quickstart.yaml seed=1 name=mine
    List settings:     medrlvr train --help""",
    help_format="plaintext",
    version=medrlvr_jax.__version__,
    group_commands=HELP,
    group_parameters=Group("Options"),
)

CONFIG = "The config: a YAML file of settings, or the name of a preset, such as quickstart."
SOURCE = "A run's folder; or a config, which stands for the model that it names."
SETTINGS = "Replace settings of the file: a.b=value, such as sample.temperature=0.8. Values are YAML."
DISTRIBUTED = "Run as one of several processes that run this same command together."
STEP = "The run's checkpoint to take. Default: the newest."
Config = Annotated[str, Parameter(help=CONFIG)]
Source = Annotated[Path, Parameter(help=SOURCE)]
Run = Annotated[Path, Parameter(help="A run's folder, such as runs/quickstart.")]
Settings = Annotated[str, Parameter(help=SETTINGS)]
Step = Annotated[int | Literal["best"] | None, Parameter(metavar="N|best", show_choices=False, help=STEP)]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Distributed = Annotated[Flag, Parameter(help=DISTRIBUTED)]
Whole = Annotated[int, Parameter(metavar="N")]
Penalty = Annotated[float, Parameter(metavar="X", validator=Number(gte=0, lt=math.inf))]
Paths = Annotated[Path, Parameter(required=True)]  # one or more
# The words up to the next option, among which settings may stand: see `apart`.
Words = Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 done, 1 failed, 2 unusable input; its help has others."""
    for stream in (sys.stdout, sys.stderr):  # a terminal whose encoding lacks … or β shows \\u2026 instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    function, arguments, _ = app.parse_args(argv)  # unusable arguments end the process here, with status 2
    if function.__module__ != __name__:  # --help, --version
        function(*arguments.args, **arguments.kwargs)
        names, _, _ = app.parse_commands(argv)
        if names and takes_settings(app[names[0]]):
            describe.show(app.console, names[0])
        return 0 if argv else 2
    name, distributed = function.__name__.strip("_"), bool(arguments.arguments.get("distributed"))
    environment.prepare(cache=not distributed)  # JAX would fill one process's cache, and the others wait
    for setting in arguments.arguments.get("settings", ()):
        if not check.reads(name, setting.partition("=")[0]):
            print(f"medrlvr {name}: {setting}: this command does not read it", file=sys.stderr)
    try:
        with together() if distributed else stopped_without_traceback():
            return function(*arguments.args, **arguments.kwargs)
    except MedrlvrError as e:
        print(f"medrlvr {name}: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1


@contextmanager
def together() -> Iterator[None]:
    """Run as one of several processes."""
    from medrlvr_jax.host.processes import distributed_run

    with distributed_run():
        yield


@contextmanager
def stopped_without_traceback() -> Iterator[None]:
    """While no other handler takes it (see `runs.log.Run`), Ctrl-C ends the process at once.

    Python's own handler would raise KeyboardInterrupt and wait until XLA's threads have compiled.
    """

    def stop(number: int, _: object) -> None:
        sys.stdout.flush()
        # in place of the progress line, which hides the cursor and would be drawn again below a print
        clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else "\n"
        os.write(2, f"{clear}stopped at once\n".encode())
        os._exit(128 + number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def takes_settings(sub: App) -> bool:
    return sub.default_command is not None and "settings" in inspect.signature(sub.default_command).parameters


def command(group: Group) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function as a command. `--help` lists commands in the order of this file."""
    return lambda function: app.command(function, group=group, sort_key=function.__code__.co_firstlineno)


def finish(summary: dict[str, Any], folder: Path) -> int:
    """Print a run's end, and write its page if it came to its end; other processes than 0 have none. A run
    that a signal stopped has its exit status.
    """
    from rich.console import Console as Screen

    from medrlvr_jax.report.ending import ending
    from medrlvr_jax.report.page import write_page

    if summary and "exit_status" not in summary:
        write_page([folder], folder / "report.html")
    if summary:  # in a terminal, lines break at words
        Screen(soft_wrap=not sys.stdout.isatty()).print(
            ending(summary, folder), markup=False, highlight=False
        )
    return int(summary.get("exit_status", 0))


def apart(words: list[str] | None, settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of an option that takes several words, and all settings, also those among the words."""
    words = words or []
    return [word for word in words if "=" not in word], [*settings, *(word for word in words if "=" in word)]


@command(TRAIN)
def init(
    file: Path,
    /,
    *,
    model: str | None = None,
    data: str | None = None,
    test: str | None = None,
    algorithm: Literal["grpo", "ppo"] | None = None,
    lora: bool | None = None,
    devices: Whole | None = None,
) -> int:
    """Write a config for your own model, data and machine.

    Asks for what is not given, if it runs in a terminal. The config has
    comments, and is checked as `medrlvr doctor` does.

        medrlvr init mine.yaml --model Qwen/Qwen2.5-3B --data train.jsonl

    Args:
        file: The config to write. The run is named after it.
        model: A Hugging Face directory, a hub name, or embedded (the default).
        data: The training questions: a file, a hub name, or embedded:train.
        test: The questions to evaluate on. Default: none.
        algorithm: Default: grpo.
        lora: Train adapters beside frozen weights, which needs far less memory. Default: all weights.
        devices: Number of GPUs or TPU chips. 0, the default: the CPU.
    """
    from medrlvr_jax.tools import init as start

    machine = {"lora": lora, "devices": devices}
    answers = start.answers(model=model, data=data, test=test, algorithm=algorithm, **machine)
    start.write_config(file, answers)
    from medrlvr_jax.tools.doctor import report

    lines, ok = report(load(file)) if answers.is_here() else ([], True)
    print("\n".join(line for line in lines if not line.startswith("ok")))
    first = "" if answers.is_here() else f"  medrlvr doctor {file}  # on the machine that it is for\n"
    print(f"{file} is written. Next:\n{first}  medrlvr data {file}\n  medrlvr train {file}")
    return 0 if ok else 1


def check_source(source: Path, settings: Sequence[str], command: str) -> None:
    """Refuse unusable settings before JAX is imported, which takes seconds."""
    config = source / "config.yaml" if source.is_dir() else source
    if config.is_file() or not source.is_dir():  # the command itself says what a folder lacks
        load(config, settings, command)


@command(TRAIN)
def train(config: Config, /, *settings: Settings, distributed: Distributed = False) -> int:
    """Train a model by reinforcement learning: PPO, GRPO and relatives.

    Each step samples answers to some questions, scores them by a rule, and
    updates the model. The run writes metrics, samples and checkpoints into
    runs/NAME/, where NAME is the setting `name`.

    First run (5 minutes on two cores):
        medrlvr train configs/quickstart.yaml
    Change settings, under another name:
        medrlvr train configs/quickstart.yaml sample.temperature=0.8 name=mine
    Resume: give the same command again; it goes on from the newest checkpoint.
    """
    checked = load(config, settings, "train")  # before JAX is imported, which takes seconds
    with stage("starting JAX"):
        from medrlvr_jax.rl.train import train

    return finish(train(checked), Path(checked.runs, checked.name))


@command(TRAIN)
def sft(config: Config, /, *settings: Settings, distributed: Distributed = False) -> int:
    """Fine-tune a model on right answers, on rationales, or on text.

    The setting sft.target chooses which. The run writes runs/NAME/, as
    `medrlvr train` does; the same command again resumes it.

        medrlvr sft configs/pretrain_lists.yaml
    """
    checked = load(config, settings, "sft")
    with stage("starting JAX"):
        from medrlvr_jax.rl.sft import sft

    return finish(sft(checked), Path(checked.runs, checked.name))


@command(TRAIN)
def reproduce(
    file: str,
    /,
    *settings: Settings,
    jobs: Whole = 1,
    only: Annotated[Words, Parameter(metavar="ARM")] = None,
    dry_run: Flag = False,
) -> int:
    """Train and evaluate all arms of a comparison over several seeds.

    Each arm with each seed is a cell: an ordinary run in runs/NAME/ARM-SEED/,
    evaluated like all others. Results: table.md, table.json and curves.png in
    runs/NAME/. The same command again skips finished cells, resumes stopped
    ones, and refuses a cell whose settings have changed.

        medrlvr reproduce configs/reproduce_tiny.yaml --jobs 2
        medrlvr reproduce configs/reproduce_tiny.yaml seeds=[0] --only ppo grpo
        medrlvr reproduce configs/reproduce_tiny.yaml name=mine model.path=DIR

    Exit status: 0 done, 1 a cell failed, 2 unusable input, 130 stopped.

    Args:
        file: The file of arms, such as configs/reproduce_tiny.yaml.
        settings: Settings of every cell, or fields of the file: a.b=value, such as seeds=[0].
        jobs: Number of cells that run at a time, each on its share of the cores.
        only: Run only these arms, and those that they start from.
        dry_run: Check the settings of every cell and say how far it is. Run nothing.
    """
    from medrlvr_jax.studies.reproduce import reproduce

    arms, every = apart(only, settings)
    return reproduce(file, every, arms, jobs, dry_run)


@command(EVALUATE)
def eval_(
    source: Source,
    /,
    *settings: Settings,
    step: Step = None,
    out: Path | None = None,
    distributed: Distributed = False,
) -> int:
    """Answer the questions of eval.sets, and report accuracies.

    Prints accuracy and format rate with 95 % intervals over questions, entropy
    per token, accuracy by subject, and how often each letter is answered and
    is right. With eval.samples above 1 also pass@k, pass@k beyond chance, and
    maj@k. A set that holds exact repeats is also counted without them.

    Writes one JSONL of answers for each set, and eval.json: all results, the
    settings, the prompt's wording, and hashes of questions and prompts.

        medrlvr eval runs/quickstart
        medrlvr eval runs/quickstart eval.samples=16 eval.temperature=1

    Args:
        out: The folder to write. Default: RUN/eval-STEP.
    """
    check_source(source, settings, "eval")
    from medrlvr_jax.evaluation.evaluate import evaluate_source

    return evaluate_source(source, list(settings), step, out)


@command(EVALUATE)
def probe(
    source: Source,
    /,
    *settings: Settings,
    step: Step = None,
    out: Path | None = None,
    scorer: str | None = None,
    distributed: Distributed = False,
) -> int:
    """Test whether the model's reasoning changes its answers.

    The model answers the questions of eval.sets greedily. Then it must answer
    at once (by its most probable letter) after the first 0, 25, 50, 75 and
    100 % of its own thought, and after the thought on another question. If
    that does not change the accuracy, the thought does no work. InfoGain
    (arXiv 2506.02126) says how much each sentence raises the probability of
    the right answer.

    Args:
        out: The folder to write: one JSONL for each set, and probe.json. Default: RUN/probe-STEP.
        scorer: The model that computes InfoGain: a directory or hub name. Compare models by the same one.
    """
    check_source(source, settings, "probe")
    from medrlvr_jax.evaluation.probe import probe_source

    return probe_source(source, list(settings), step, out, scorer)


@command(EVALUATE)
def compare(a: Path, b: Path, /, *more: Path, anyway: Flag = False, json: Flag = False) -> int:
    """Compare two runs, or two evaluations, on the same questions by paired tests; or several in one table.

        medrlvr compare runs/quickstart runs/quickstart_grpo
        medrlvr compare runs/base runs/ct runs/mri              # by set and subject: train × test

    Of a run, the newest evaluation is taken; one that has none is evaluated
    first, as `medrlvr eval` does. Questions are paired by id and content. p comes from McNemar's exact test
    where each question has one answer, otherwise from a t test over questions.
    Evaluations that differ in questions, prompt, number of samples, decoding
    or rule are refused, since then more than the model differs.

    Args:
        a: A run's folder, or one that `medrlvr eval` wrote, such as runs/quickstart/eval-32.
        b: The other model's.
        more: Further ones. The table then has the gains of all over the first.
        anyway: Compare the questions that are in both, although more than the model differs.
        json: Print everything as one JSON object, with pass@k, majority and letters.
    """
    from json import dumps

    from medrlvr_jax.evaluation import compare as paired

    if more:
        columns = paired.matrix([a, b, *more], anyway)
        print(dumps(columns) if json else paired.show_matrix(columns))
        return 0
    first, second = paired.evaluation(a), paired.evaluation(b)
    result = paired.compare(first, second, anyway)
    names = paired.names_of(first, second)
    print(dumps(result) if json else f"{first} against {second}\n\n{paired.show(result, names)}")
    return 0


@command(EVALUATE)
def difficulty(
    source: Source,
    /,
    *settings: Settings,
    step: Step = None,
    samples: Whole = 16,
    history: Flag = False,
    out: Path | None = None,
    distributed: Distributed = False,
) -> int:
    """Count how many samples are right for each training question.

    Samples the questions of `data` as in training. The file that it writes
    chooses training questions, here those with 1 to 7 right samples, or orders
    them (order: easy_first):
        medrlvr train CONFIG.yaml 'data.pass_count={file: FILE, keep: [1, 7]}'
    An interrupted count continues with the same command.

    Args:
        samples: Number of samples for each question.
        history: Sample nothing: compute each question's variance (1-shot RLVR) and impact (LIMR) from the
            run's questions.jsonl, for data.pass_count={file: FILE, order: variance, top: 16}.
        out: The JSONL to write. Default: RUN/difficulty-STEP.jsonl, with --history RUN/history.jsonl.
    """
    check_source(source, settings, "difficulty")
    from medrlvr_jax.evaluation.difficulty import difficulty_source, from_history

    if history:
        return from_history(source, out)
    return difficulty_source(source, list(settings), step, samples, out)


@command(EVALUATE)
def contamination(*sets: Paths, eval: Path | None = None, out: Path | None = None) -> int:
    """Find test questions that the training set holds too, exactly or nearly.

    Two questions match if their stems have the same words, or if the longer
    stem holds more than half of the shorter one's 8-grams (those of over 1 %
    of the stems do not count). Short stems must also share an option. The
    training set is compared with itself as well.

    Args:
        sets: Files of questions: training set, then test sets. Or one config: its data against its eval.sets.
        eval: A folder that `medrlvr eval` wrote: print its accuracies with and without matching questions.
        out: The JSON file to write: every matching question, and the training question that it is like.
    """
    from medrlvr_jax.evaluation import contamination as overlap

    result = overlap.contamination([str(path) for path in sets], eval)
    print(overlap.show(result))
    if out:
        write_json(out, result)
        print(f"questions: {out}")
    return 0


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
    from medrlvr_jax.tools.show_data import show_data

    print(show_data(checked, prompts))
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
    from medrlvr_jax.tools import replay as again

    result = again.replay(run, step, row, list(settings))
    print(again.show(result))
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
    from medrlvr_jax.rewards.parse import judged_beginning
    from medrlvr_jax.tools.score_file import score_file, show

    reasons = score_file(file, out, rule, prefill=judged_beginning(prefill, mode))
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
