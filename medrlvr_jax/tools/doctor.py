"""`medrlvr doctor [CONFIG]`: check the machine, and whether a run of this config can start.

Each line is ok, a note, a warning (the run can start) or a problem (it cannot). Warnings and problems come
with a remedy.
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
from medrlvr_jax import build
from medrlvr_jax.build import Parts
from medrlvr_jax.config import check
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data.load import read
from medrlvr_jax.data.prompts import response_prefix
from medrlvr_jax.data.traps import tokenizer_traps
from medrlvr_jax.evaluation.evaluate import load_sets
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import lora, weights
from medrlvr_jax.rewards.parse import prefix_conflict
from medrlvr_jax.rewards.training import start_components
from medrlvr_jax.rl import sft, train
from medrlvr_jax.rl.learn import make_optimizer
from medrlvr_jax.rollout.rollout import encode
from medrlvr_jax.runs import checkpoint, inputs, log, seal, trackers

GIB = 2**30
# The device file of each accelerator, and the extra that installs its JAX.
ACCELERATORS = {"/dev/nvidia0": "cuda", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}


class Finding(NamedTuple):
    mark: str  # ok, note, warning, problem
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.mark:8} {self.text}" + (f"; {self.remedy}" if self.remedy else "")


ok, note, warning, problem = (partial(Finding, mark) for mark in ("ok", "note", "warning", "problem"))


def report(config: Config | None) -> tuple[list[str], bool]:
    """Return the lines to print, and True if there are no problems."""
    findings = [*_check_packages(), *_check_devices(), *_check_memory()]
    findings += _check_run(config) if config else _check_disk(Path("runs"))
    return [str(f) for f in findings], all(f.mark != "problem" for f in findings)


def _check_packages() -> Iterator[Finding]:
    """Compare the installed packages with the requirements of this package."""
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
            yield problem(f"{need.name} {version} is installed, but {need.specifier} is required", remedy)
        installed.append(f"{need.name} {version}")
    yield ok(", ".join(installed))


def _check_devices() -> Iterator[Finding]:
    kind, backend, processes = jax.devices()[0].device_kind, jax.default_backend(), jax.process_count()
    yield ok(f"{len(jax.devices())} × {kind} ({backend}), {processes} process(es)")
    for path, extra in ACCELERATORS.items():
        if backend == "cpu" and Path(path).exists():
            name = "an NVIDIA GPU" if extra == "cuda" else "a TPU"
            remedy = f"pip install 'medrlvr-jax[{extra}]'"
            yield warning(f"this machine has {name} ({path}), but JAX uses only the CPU", remedy)
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        effect = "64-bit mode is on: runs are slower, and numbers differ from the published ones"
        yield warning(effect, "unset JAX_ENABLE_X64")


def _check_memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield ok(f"host memory: {total / GIB:.1f} GiB, {os.cpu_count()} cores")
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        limit, used = stats["bytes_limit"], stats.get("bytes_in_use", 0)
        yield ok(f"device memory: {limit / GIB:.1f} GiB each, {(limit - used) / GIB:.1f} GiB of it free")


def _check_disk(folder: Path) -> Iterator[Finding]:
    """Check the free space in a folder of runs, and list the runs in use."""
    exists = _existing(folder)
    free = shutil.disk_usage(exists).free / GIB
    if not os.access(exists, os.W_OK):
        yield problem(f"{exists} is not writable", "set runs= to a folder that is")
    text = f"{folder}: {free:.1f} GiB free"
    yield ok(text) if free > 5 else warning(text, "set runs= to a larger disk")
    for run in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ():
        if holder := log.lock_holder(run):
            yield note(f"{run} is in use by {holder}")


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(p for p in (folder, *folder.absolute().parents) if p.is_dir())


def _check_run(config: Config) -> Iterator[Finding]:
    """Check all that a training with this config needs, and the checkpoints to resume from. Write nothing."""
    yield from _check_disk(Path(config.runs))
    path = Path(config.runs) / config.name
    if holder := log.lock_holder(path):
        remedy = "wait for it, stop it, or give this run another name="
        yield problem(f"{path} is in use by {holder}", remedy)
    checks = [_check_settings(config, path)]
    try:
        parts = build.build(config)
        checks += [_check_model(parts, path), _check_data(parts)]
    except ConfigError as e:
        yield problem(str(e))
    for findings in checks:
        try:
            yield from findings
        except ConfigError as e:
            yield problem(str(e))
    for step in checkpoint.saved_steps(path / "checkpoints"):
        if wrong := seal.find_damage(path / "checkpoints" / str(step), seal.SMALL):
            yield warning(f"checkpoint {step} is damaged: {wrong}", "the run will not use it")
        else:
            yield ok(f"checkpoint {step} is complete")


def _check_settings(config: Config, run: Path) -> Iterator[Finding]:
    """Check that the run's folder has these settings, and that trackers and reward functions can start."""
    if (run / "config.yaml").exists():
        log.check_same(run / "config.yaml", config)
    trackers.check(config)
    with start_components(config.reward):  # this imports reward.fn as training does
        yield ok("settings, trackers and reward can be used")


def _check_data(parts: Parts) -> Iterator[Finding]:
    """Read and encode the training set and the evaluation sets as training does."""
    config = parts.config
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
    yield ok(f"data {config.data.path}: {first}; the longest example has {longest} tokens")
    if dropped:
        yield warning(f"data: {dropped:,} prompts are too long and dropped", "raise prompt.max_tokens")
    for name, encoded in load_sets(parts).items():
        yield ok(f"eval.sets.{name}: {len(encoded.questions):,} questions")
        if encoded.dropped:
            text = f"eval.sets.{name}: {encoded.dropped:,} prompts are too long and dropped"
            yield warning(text, "raise prompt.max_tokens")


def _check_model(parts: Parts, run: Path) -> Iterator[Finding]:
    """Check mesh, weights and tokenizer by the code that starts a training."""
    config = parts.config
    check.check_best(config)
    inputs.check_model(run, parts)
    yield ok(f"mesh: {' × '.join(f'{axis} {size}' for axis, size in parts.mesh.shape.items())}")
    params = build.abstract_params(parts, parts.cfg)
    total, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, lora.trained(params, parts.cfg))
    )
    frozen = f", of which {trained / 1e6:,.1f} million are trained" if trained < total else ""
    yield ok(f"model {config.model.path}: {total / 1e6:,.1f} million parameters{frozen}")
    if config.model.init == "pretrained":
        weights.check_weights(config.model.path, lora.without_adapters(parts.cfg))
        if others := weights.ignored_files(config.model.path):
            text = f"weights: {', '.join(others)} will not be read, because model.safetensors exists"
            yield warning(text, "to use them, move model.safetensors away")
    for line in tokenizer_traps(parts.tokenizer, parts.cfg.vocab, config.prompt):
        yield note(f"tokenizer: {line}")
    if trap := prefix_conflict(response_prefix(parts.tokenizer, config.prompt), config.reward.mode):
        yield warning(*trap)
    learners = ((parts.cfg, config.learn.policy), (parts.critic_cfg, config.learn.critic))
    states = [build.abstract_learner(parts, cfg, make_optimizer(o, 1)) for cfg, o in learners if o]
    yield _check_space(config, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states)))


def _check_space(config: Config, size: int) -> Finding:
    """Check that the disk has space for all checkpoints, each of `size` bytes."""
    count = config.checkpoint.keep + 1 + (config.checkpoint.best is not None)  # one more while it is written
    free = shutil.disk_usage(_existing(Path(config.runs))).free
    text = f"checkpoints: up to {count} × {size / GIB:.2f} GiB, {free / GIB:.1f} GiB free"
    remedy = "lower checkpoint.keep, or set runs= to a larger disk"
    return problem(text, remedy) if free < count * size else ok(text)
