"""The commands that make a model: init, train, sft, reproduce."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from medrlvr_jax.cli.app import TRAIN, Config, Distributed, Flag, Settings, Whole, Words, apart, command, load


def finish(summary: dict[str, Any], folder: Path) -> int:
    """Print a run's end and write its page, if it came to its end; other processes than 0 have none. A run
    that a signal stopped has its exit status, and its console has said so.
    """
    from medrlvr_jax.host.tables import say
    from medrlvr_jax.report.ending import ending
    from medrlvr_jax.report.page import write_page

    if summary and "exit_status" not in summary:
        write_page([folder], folder / "report.html")
        say(ending(summary, folder))
    return int(summary.get("exit_status", 0))


def starting_jax() -> AbstractContextManager[Any]:
    """Says what takes seconds before a run's first line."""
    from medrlvr_jax.runs.console import stage

    return stage("starting JAX")


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
    checked = load(config, settings, "train")
    with starting_jax():
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
    with starting_jax():
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
