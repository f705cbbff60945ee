"""Send a run's metrics to TensorBoard, Weights & Biases and trackio, as `log` asks. Only process 0 does this.

A resumed run continues the same run there. TensorBoard replaces the events after the checkpoint. The other
two get the id in `<run>/wandb_id`. Each folder has its own id, so that runs with equal names stay separate.
"""

import importlib.util
import netrc
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError

# For each setting of `log`: the package that it needs, and the value that turns it off.
PACKAGES = {
    "tensorboard": ("tensorboardX", "false"),
    "wandb": ("wandb", "null"),
    "trackio": ("trackio", "null"),
}
Rows = Sequence[Mapping[str, Any]]


def check(config: Config) -> None:
    """Raise `ConfigError` if the package or the login of a tracker is missing."""
    for name, (package, off) in PACKAGES.items():
        value = getattr(config.log, name)
        if value and not importlib.util.find_spec(package):
            remedy = f"pip install 'medrlvr-jax[{name}]', or set it to {off}"
            raise ConfigError(f"log.{name}: {value} needs {package}, which is not installed; {remedy}")
    if config.log.wandb and not _wandb_login():
        remedy = "run `wandb login`, or set WANDB_MODE=offline (`wandb sync` uploads later)"
        raise ConfigError(f"log.wandb: {config.log.wandb} needs a login, but there is none; {remedy}")


def _wandb_login() -> bool:
    """Return whether W&B is offline, or an API key is set or stored by `wandb login`."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    chosen = os.environ.get("NETRC")
    for path in [Path(chosen)] if chosen else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        if path.is_file():
            with files.reading(path, "repair it, or set WANDB_API_KEY"):
                return netrc.netrc(str(path)).authenticators(host) is not None
    return False


def tag(metric: str) -> str:
    """Return a metric's name with a group for trackers: `eval/dev/accuracy`, `train/reward`."""
    if metric.startswith("eval."):
        return "eval/" + "/".join(metric.removeprefix("eval.").rsplit(".", 1))
    return metric if "/" in metric else f"train/{metric}"


class Tracker:
    """The trackers of one run. `done`: the number of finished steps when it starts."""

    def __init__(self, folder: Path, config: Config, done: int):
        self._board, self._others, tree = None, [], configs.to_tree(config)
        self._ends: list[Callable[[bool], Any]] = []  # called at the end with True if the run has failed
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
            from tensorboardX.summary import hparams  # pyright: ignore[reportMissingImports]

            self._board = board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
            self._ends.append(lambda _: board.close())
            flat = configs.flat(tree)
            self._board.add_text("settings", _as_code("\n".join(f"{k}: {v}" for k, v in flat.items())))
            settings = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in flat.items()}
            scores = ["train/reward", "train/accuracy"]
            scores += [f"eval/{name}/accuracy" for name in config.eval.sets]
            for summary in hparams(settings, dict.fromkeys(scores, 0.0)):  # the tab HPARAMS
                if self._board.file_writer:
                    self._board.file_writer.add_summary(summary)
        run_id = _run_id(folder) if config.log.wandb or config.log.trackio else ""
        if project := config.log.wandb:
            import wandb  # pyright: ignore[reportMissingImports]

            identity = {"name": config.name, "id": run_id, "resume": "allow"}
            wandb_run = wandb.init(project=project, config=tree, dir=str(folder), **identity)
            self._others.append(wandb_run)
            self._ends.append(lambda failed: wandb_run.finish(exit_code=int(failed)))
        if project := config.log.trackio:
            import trackio  # pyright: ignore[reportMissingImports]

            name = f"{config.name}-{run_id[:6]}"  # trackio identifies runs by their names
            trackio_run = trackio.init(project=project, name=name, config=tree, resume="allow")
            self._others.append(trackio_run)
            self._ends.append(lambda _: trackio_run.finish())

    def log(self, step: int, metrics: Mapping[str, Any], samples: Rows = ()) -> None:
        """Send the step's metrics that have a value. TensorBoard also gets the samples as text."""
        numbers = {tag(k): float(v) for k, v in metrics.items() if v is not None}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            for place, row in enumerate(samples):
                text = f"{row['prompt']}\n{row['completion']}\n\nkey {row['key']}, reward {row['reward']}"
                self._board.add_text(f"samples/{place}", _as_code(text), step)
        for tracker in self._others:
            tracker.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        """Finish all trackers. W&B marks the run if it has `failed`."""
        for end in self._ends:
            end(failed)


def _run_id(folder: Path) -> str:
    file = folder / "wandb_id"
    if not file.exists():
        files.write_text(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8")


def _as_code(text: str) -> str:
    """Indent a text, so that TensorBoard's Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())
