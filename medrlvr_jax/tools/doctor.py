"""`medrlvr doctor [CONFIG]`: check the machine, and what would stop a run, before it starts.

Each line is ok, a note, a warning (it will run, perhaps not as you wish) or a problem (it will not run), the
last two with a remedy.
"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from packaging.requirements import Requirement

import medrlvr_jax
from medrlvr_jax.config import check
from medrlvr_jax.config.schema import Config
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.rewards.training import start_components
from medrlvr_jax.runs import checkpoint, log, seal, trackers

GIB = 2**30
# An accelerator's device file, and the extra whose JAX uses it.
ACCELERATORS = {"/dev/nvidia0": "cuda", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}


class Finding(NamedTuple):
    mark: str  # ok, note, warning, problem
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.mark:8} {self.text}" + (f"; {self.remedy}" if self.remedy else "")


ok, note, warning, problem = (partial(Finding, mark) for mark in ("ok", "note", "warning", "problem"))


def report(config: Config | None) -> tuple[list[str], bool]:
    """The lines to print, and whether there is no problem."""
    findings = [*_packages(), *_devices(), *_memory()]
    findings += _run(config) if config else _runs(Path("runs"))
    return [str(f) for f in findings], all(f.mark != "problem" for f in findings)


def _packages() -> Iterator[Finding]:
    """The package's own requirements, as they were installed."""
    git = log.git_revision()
    revision = f", revision {git['revision'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    python = f"python {platform.python_version()}, {platform.platform()}"
    yield ok(f"medrlvr_jax {medrlvr_jax.__version__}{revision}, {python}")
    installed = []
    for text in importlib.metadata.requires("medrlvr-jax") or ():
        need, remedy = Requirement(text), f"pip install '{text}'"
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield problem(f"{need.name} is not installed", remedy)
            continue
        if version not in need.specifier:
            yield problem(f"{need.name} {version} is here, {need.specifier} is needed", remedy)
        installed.append(f"{need.name} {version}")
    yield ok(", ".join(installed))


def _devices() -> Iterator[Finding]:
    kind, backend, processes = jax.devices()[0].device_kind, jax.default_backend(), jax.process_count()
    yield ok(f"{len(jax.devices())} × {kind} ({backend}), {processes} process(es)")
    for path, extra in ACCELERATORS.items():
        if backend == "cpu" and Path(path).exists():
            name = "an NVIDIA GPU" if extra == "cuda" else "a TPU"
            remedy = f"pip install 'medrlvr-jax[{extra}]'"
            yield warning(f"{path} says there is {name}, but JAX sees only the CPU", remedy)
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        slower = "64-bit mode is on: slower, and other numbers than those published here"
        yield warning(slower, "unset JAX_ENABLE_X64")


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield ok(f"host memory: {total / GIB:.1f} GiB, {os.cpu_count()} cores")
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        limit, used = stats["bytes_limit"], stats.get("bytes_in_use", 0)
        yield ok(f"device memory: {limit / GIB:.1f} GiB each, {(limit - used) / GIB:.1f} GiB of it unused")


def _runs(folder: Path) -> Iterator[Finding]:
    """Disk and locks of a folder of runs."""
    exists = _existing(folder)
    free = shutil.disk_usage(exists).free / GIB
    if not os.access(exists, os.W_OK):
        yield problem(f"{exists} cannot be written", "set runs= to a folder that can")
    text = f"{folder}: {free:.1f} GiB free"
    yield ok(text) if free > 5 else warning(text, "set runs= to a roomier disk")
    for run in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ():
        if holder := log.lock_holder(run):
            yield note(f"{run} is in use by {holder}")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(p for p in (folder, *folder.absolute().parents) if p.is_dir())


def _run(config: Config) -> Iterator[Finding]:
    """The checks of a training with this config, and the checkpoints it would resume from; writes nothing."""
    yield from _runs(Path(config.runs))
    path = Path(config.runs) / config.name
    if holder := log.lock_holder(path):
        remedy = "wait for it, stop it, or give this run another name="
        yield problem(f"{path} is in use by {holder}", remedy)
    for part in (_settings(config, path), _model(config, path), _data(config)):
        try:
            yield from part
        except ConfigError as e:
            yield problem(str(e))
    for step in checkpoint.saved_steps(path / "checkpoints"):
        if wrong := seal.damage(path / "checkpoints" / str(step), seal.SMALL):
            yield warning(f"checkpoint {step} is damaged: {wrong}", "an older one will be used")
        else:
            yield ok(f"checkpoint {step} is there")


def _settings(config: Config, run: Path) -> Iterator[Finding]:
    """What the settings ask of the run's folder, of its trackers and of a user's reward function."""
    if (run / "config.yaml").exists():
        log.check_same(run / "config.yaml", config)
    trackers.check(config)
    with start_components(config.reward):  # a reward.fn is imported as training does it
        yield ok("settings, trackers and reward can be used")


def _data(config: Config) -> Iterator[Finding]:
    """The training set and the sets of eval.sets, read and encoded as for training."""
    from medrlvr_jax import build
    from medrlvr_jax.data.load import read
    from medrlvr_jax.evaluation.evaluate import load_sets
    from medrlvr_jax.rl import sft, train
    from medrlvr_jax.rollout.rollout import encode

    parts = build.build(config)
    if config.sft.target == "text" or config.data.format == "text":
        encoded, targets = sft.encode_pairs(parts)
        dropped, how_read = encoded.dropped, encoded.how_read
        longest = max(len(p) + len(t) for p, t in zip(encoded.tokens, targets, strict=True))
    else:
        questions, how_read = read(config.data)
        encoded = encode(parts.tokenizer, questions, config, config.data.shuffle_options, parts.cfg.vision)
        train.check_lengths(parts, encoded)
        dropped, longest = encoded.dropped, encoded.longest
    first = how_read.partition("\n")[0]
    yield ok(f"data {config.data.path}: {first}; the longest has {longest} tokens")
    if dropped:
        yield warning(f"data: {dropped:,} dropped as too long", "raise prompt.max_tokens")
    for name, encoded in load_sets(parts).items():
        text = f"eval.sets.{name}: {len(encoded.questions):,} questions"
        if encoded.dropped:
            yield warning(f"{text}, {encoded.dropped:,} dropped as too long", "raise prompt.max_tokens")
        else:
            yield ok(text)


def _model(config: Config, run: Path) -> Iterator[Finding]:
    """Mesh, model and tokenizer, by the code that starts a training."""
    from medrlvr_jax import build
    from medrlvr_jax.data.prompts import begins
    from medrlvr_jax.data.traps import tokenizer_traps
    from medrlvr_jax.model import lora, weights
    from medrlvr_jax.rewards.parse import prefix_conflict
    from medrlvr_jax.rl.learn import make_optimizer
    from medrlvr_jax.runs import inputs

    check.check_best(config)
    parts = build.build(config)
    inputs.check_model(run, parts)
    yield ok(f"mesh: {' × '.join(f'{axis} {size}' for axis, size in parts.mesh.shape.items())}")
    params = build.abstract_params(parts, parts.cfg)
    total, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, lora.trained(params, parts.cfg))
    )
    frozen = f", of which {trained / 1e6:,.1f} million are trained" if trained < total else ""
    yield ok(f"model {config.model.path}: {total / 1e6:,.1f} million parameters{frozen}")
    if config.model.init == "pretrained":
        weights.check_weights(config.model.path, lora.off(parts.cfg))
        if others := weights.passed_over(config.model.path):
            text = f"weights: {', '.join(others)}: passed over, since there is a model.safetensors"
            yield warning(text, "if they are the weights that you mean, move model.safetensors away")
    for line in tokenizer_traps(parts.tokenizer, parts.cfg.vocab, config.prompt):
        yield note(f"tokenizer: {line}")
    if trap := prefix_conflict(begins(parts.tokenizer, config.prompt), config.reward.mode):
        yield warning(*trap)
    learners = ((parts.cfg, config.learn.policy), (parts.critic_cfg, config.learn.critic))
    states = [build.abstract_learner(parts, cfg, make_optimizer(o, 1)) for cfg, o in learners if o]
    yield _room(config, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states)))


def _room(config: Config, size: int) -> Finding:
    """Disk for the checkpoints kept, of `size` bytes each."""
    count = config.checkpoint.keep + 1 + (config.checkpoint.best is not None)  # one more while it is written
    free = shutil.disk_usage(_existing(Path(config.runs))).free
    text = f"checkpoints: up to {count} × {size / GIB:.2f} GiB, {free / GIB:.1f} GiB free"
    remedy = "lower checkpoint.keep, or set runs= to a roomier disk"
    return problem(text, remedy) if free < count * size else ok(text)
