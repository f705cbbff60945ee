"""The commands that train models: init, train, sft, reproduce."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from medrlvr_jax.cli.app import (
    TRAIN,
    Config,
    Distributed,
    Flag,
    NonNegativeInteger,
    PositiveInteger,
    Settings,
    Words,
    command,
    load,
    split_settings,
)

REPRODUCE_SETTINGS = "Override settings of every cell or fields of the file: a.b=value, such as seeds=[0]."


def finish(summary: dict[str, Any], folder: Path) -> int:
    """Print a finished run's results and write its report. Return the exit status.

    Only process 0 has a summary. The summary of an interrupted run holds only an exit status.
    """
    from medrlvr_jax.host.tables import say
    from medrlvr_jax.report.ending import ending
    from medrlvr_jax.report.page import write_page

    if summary and "exit_status" not in summary:
        write_page([folder], folder / "report.html")
        say(ending(summary, folder))
    return int(summary.get("exit_status", 0))


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
    devices: NonNegativeInteger | None = None,
) -> int:
    """Write a config for your own model, data and machine.

    In a terminal it asks for each option that is not given. The config
    contains comments. It is checked as by `medrlvr doctor`.

        medrlvr init mine.yaml --model Qwen/Qwen2.5-3B --data train.jsonl

    Args:
        file: The config to write. The run gets the name of this file.
        model: A Hugging Face directory, a hub name, or embedded (the default).
        data: The training questions: a file, a hub name, or embedded:train.
        test: The questions to evaluate on. Default: none.
        algorithm: The algorithm. Default: grpo.
        lora: Train LoRA adapters, which needs much less memory. Default: train all weights.
        devices: Number of GPUs or TPU chips. 0 stands for the CPU and is the default.
    """
    from medrlvr_jax.tools import init as start

    options = {"model": model, "data": data, "test": test, "algorithm": algorithm}
    answers = start.get_answers(**options, lora=lora, devices=devices)
    start.write_config(file, answers)
    from medrlvr_jax.tools.doctor import report

    is_local = answers.for_this_machine()
    lines, ok = report(load(file)) if is_local else ([], True)
    print("\n".join(line for line in lines if not line.startswith("ok")))
    first = "" if is_local else f"  medrlvr doctor {file}  # on the machine that will train\n"
    print(f"{file} was written. Next:\n{first}  medrlvr data {file}\n  medrlvr train {file}")
    return 0 if ok else 1


@command(TRAIN)
def train(config: Config, /, *settings: Settings, distributed: Distributed = False) -> int:
    """Train a model by reinforcement learning: PPO, GRPO and relatives.

    Each step samples answers to some questions, scores them by a rule, and
    updates the model. The run writes metrics, samples and checkpoints into
    runs/NAME/, where NAME is the setting `name`.

    First run (5 minutes on two cores):
        medrlvr train configs/quickstart.yaml
    Change settings and give the run another name:
        medrlvr train configs/quickstart.yaml sample.temperature=0.8 name=mine
    Resume: run the same command again. It continues from the newest checkpoint.
    """
    checked = load(config, settings, "train")
    from medrlvr_jax.runs.console import stage

    with stage("starting JAX"):
        from medrlvr_jax.rl.train import train

    return finish(train(checked), Path(checked.runs, checked.name))


@command(TRAIN)
def sft(config: Config, /, *settings: Settings, distributed: Distributed = False) -> int:
    """Fine-tune a model on right answers, on rationales, or on text.

    The setting sft.target selects the target. The run writes into runs/NAME/,
    as with `medrlvr train`. The same command resumes it.

        medrlvr sft configs/pretrain_lists.yaml
    """
    checked = load(config, settings, "sft")
    from medrlvr_jax.runs.console import stage

    with stage("starting JAX"):
        from medrlvr_jax.rl.sft import sft

    return finish(sft(checked), Path(checked.runs, checked.name))


@command(TRAIN)
def reproduce(
    file: str,
    /,
    *settings: Annotated[str, Parameter(help=REPRODUCE_SETTINGS)],
    jobs: PositiveInteger = 1,
    only: Annotated[Words, Parameter(metavar="ARM")] = None,
    dry_run: Flag = False,
) -> int:
    """Train and evaluate all arms of a comparison over several seeds.

    Each pair of an arm and a seed is a cell: an ordinary run in the folder
    runs/NAME/ARM-SEED/. The results are table.md, table.json and curves.png in
    runs/NAME/. The same command again skips finished cells, resumes stopped
    cells, and refuses a cell whose settings have changed.

        medrlvr reproduce configs/reproduce_tiny.yaml --jobs 2
        medrlvr reproduce configs/reproduce_tiny.yaml seeds=[0] --only ppo grpo
        medrlvr reproduce configs/reproduce_tiny.yaml name=mine model.path=DIR

    Exit status: 0 done, 1 a cell failed, 2 invalid input, 130 stopped.

    Args:
        file: The file that describes the arms, such as configs/reproduce_tiny.yaml.
        jobs: Number of cells that run at the same time. They share the cores equally.
        only: Run only these arms and the arms that they start from.
        dry_run: Run nothing. Check the settings of every cell and print its progress.
    """
    from medrlvr_jax.studies.reproduce import reproduce

    arms, overrides = split_settings(only, settings)
    return reproduce(file, overrides, arms, jobs, dry_run)
