"""Evaluation: sample and score answers to whole sets of questions, with training's own sampler and rule."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medrlvr_jax.build import Parts, abstract_params, build, check_positions, load_base, load_policy
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.load import load
from medrlvr_jax.config.schema import Config, SampleConfig, SetConfig
from medrlvr_jax.data import load as data
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.images import with_thumbnails
from medrlvr_jax.data.question import Question, fingerprint, question_hash
from medrlvr_jax.data.tokenizer import Progress, no_progress
from medrlvr_jax.evaluation import answers, look, monitors
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import gather_rows
from medrlvr_jax.host.tables import say
from medrlvr_jax.model import lora
from medrlvr_jax.rewards.parse import prefix_conflict
from medrlvr_jax.rollout.program import Program, draw_program
from medrlvr_jax.rollout.rollout import Encoded, encode, prefetch_images, reorder, sample_and_score
from medrlvr_jax.rollout.see import see_program
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs import inputs, log
from medrlvr_jax.runs.checkpoint import Which, best_step, restore_params
from medrlvr_jax.runs.console import Console, ShowProgress, show_nothing, stage
from medrlvr_jax.types import Params

MAX_THUMBNAILS = 400  # answers of a set that hold small copies of their images, for the page
NOISE = 2**31 + 1  # folded into the seed: other noise than in training, and the same at every step


def load_sets(parts: Parts, show: ShowProgress = show_nothing) -> dict[str, Encoded]:
    """Read and encode every evaluation set of the config.

    Raises `ConfigError` if no question of a set fits `prompt.max_tokens`, or if a prompt and its response
    exceed the model's positions.
    """
    sets, c = {}, parts.config
    field = "sample.max_new_tokens" if c.eval.max_new_tokens is None else "eval.max_new_tokens"
    for name, spec in c.eval.sets.items():
        show(f"reading eval.sets.{name}", 0, 0)
        questions, how_read = data.read(spec)
        encoding, shuffle = partial(show, f"encoding eval.sets.{name}"), spec.shuffle_options
        encoded = encode(parts.tokenizer, questions, c, shuffle, parts.cfg.vision, encoding)
        if not encoded.questions:
            limit = f"prompt.max_tokens = {c.prompt.max_tokens}"
            raise ConfigError(f"eval.sets.{name}: no question of {spec.path} fits {limit}; raise it")
        if encoded.dropped:
            how_read += f"\n  dropped: {encoded.dropped:,} questions, longer than prompt.max_tokens; raise it"
        sets[name] = dataclasses.replace(encoded, how_read=how_read)
        check_positions(parts, encoded.longest, rollout_settings(c, encoded).max_new_tokens, field)
    return sets


def evaluate(
    parts: Parts,
    decode_params: Params,
    encoded: Encoded,
    progress: Progress = no_progress,
    entropies: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer all questions of a set.

    Returns the counts (`answers.summarise`) and a row for each answer, in the order of questions and on all
    processes. With `entropies`, each row has the mean entropy of its response.
    """
    n, c = len(encoded.questions), parts.config.eval
    draws, rows = c.samples if encoded.shuffle else 1, []
    for draw in range(draws):
        for start in range(0, n, c.batch):
            index, following = (np.arange(a, min(a + c.batch, n)) for a in (start, start + c.batch))
            if len(following):
                prefetch_images(parts, encoded, np.resize(following, c.batch))
            rows += answer_batch(parts, decode_params, encoded, index, draw, entropies)
            progress((draw * n + int(index[-1]) + 1) // draws, n)
    rows = gather_rows(rows)
    return answers.summarise(rows, encoded.dropped), rows


def answer_batch(
    parts: Parts,
    decode_params: Params,
    encoded: Encoded,
    index: np.ndarray,
    draw: int = 0,
    entropies: bool = False,
) -> list[tuple[int, dict[str, Any]]]:
    """Answer the questions at `index`, at most `eval.batch` of them, `eval.samples` times each.

    If the options are shuffled, each question is answered once, with its options in order number `draw`.
    Returns the rows that this process scored, each with its position among all answers to the set.
    """
    c, n = parts.config, len(index)
    sample = rollout_settings(c, encoded)
    key = jax.random.fold_in(jax.random.key(c.seed), np.uint32(NOISE))
    # A short last batch repeats its questions, so that it has the compiled shape; repeats are not counted.
    index = np.resize(index, c.eval.batch)
    if encoded.shuffle:
        encoded, key = reorder(parts, encoded, index, draw), jax.random.fold_in(key, draw)
    scored = sample_and_score(decode_params, parts, encoded, index, key, sample, entropies)
    rows = []
    for row in np.flatnonzero(scored.places < n * sample.samples).tolist():
        place, which = divmod(int(scored.places[row]), sample.samples)
        question, which = scored.questions[row], draw + which
        about = {"subject": question.subject, "sample": which, "question_hash": question_hash(question)}
        about |= {"task": question.task} if question.task else {}
        about["question"] = text.render(question, "none")
        if question.id in encoded.repeats:
            about["repeats"] = encoded.repeats[question.id]
        rows.append((int(index[place]) * c.eval.samples + which, scored.record(row) | about))
    return rows


def rollout_settings(c: Config, encoded: Encoded) -> SampleConfig:
    """Return the settings with which a rollout answers one batch of an evaluation."""
    return SampleConfig(
        questions=c.eval.batch,
        samples=1 if encoded.shuffle else c.eval.samples,
        max_new_tokens=c.eval.max_new_tokens or c.sample.max_new_tokens,
        temperature=c.eval.temperature,
    )


def programs(parts: Parts, sets: dict[str, Encoded]) -> list[Program]:
    """Return the programs that `evaluate_sets` calls. Sets of the same shape share one."""
    shape_of = lambda encoded: (rollout_settings(parts.config, encoded), encoded.width, encoded.windows)
    shapes = {shape_of(encoded): name for name, encoded in sets.items()}
    names = {windows: name for (_, _, windows), name in shapes.items() if windows}
    batch = parts.config.eval.batch
    return [
        *(see_program(parts, batch, windows, f"see {name}") for windows, name in names.items()),
        *(draw_program(parts, *shape[:2], f"eval {name}", shape[2]) for shape, name in shapes.items()),
    ]


def evaluate_sets(
    parts: Parts, decode_params: Params, sets: dict[str, Encoded], run: log.Run, step: int
) -> dict[str, Any]:
    """Evaluate every set of a run after `step` steps. Returns flat metrics, `eval.<set>.<count>`.

    Writes the answers into the run's folder, and a notice if many of them were cut off.
    """
    metrics = {}
    for name, encoded in sets.items():
        with jax.profiler.TraceAnnotation("evaluate"):
            counts, rows = evaluate(parts, decode_params, encoded, partial(run.progress, f"eval {name}"))
        run.write_answers(step, name, rows, encoded.questions)
        metrics |= {f"eval.{name}.{k}": v for k, v in counts.items()}
        if counts["truncated"] > monitors.HIGH["truncated"][0] * counts["n"]:
            run.notify(answers.remarks(f"eval {name}", counts)[-1])
    return metrics


def open_policy(
    source: Path, settings: Mapping[str, Any] | Sequence[str], step: Which, command: str | None = None
) -> tuple[Parts, Params, int]:
    """Return a run's policy and its step, or the model that a config names and step 0.

    `step` None is the newest checkpoint. The parameters contain a run's adapters. `command` decides which
    settings are required and checked (`config.load.load`). Raises `ConfigError` if there is no such run, or
    if a step is given without a run.
    """
    is_run = source.is_dir()
    # A name without a folder or a suffix is that of a preset.
    if not source.exists() and len(source.parts) > 1 and not source.suffix:
        remedy = "give a run's folder, such as runs/quickstart, or a config file"
        raise ConfigError(f"{source}: there is no such run; {remedy}")
    if step is not None and not is_run:
        why = f"{source} is no run's folder, so there are no checkpoints"
        raise ConfigError(f"--step {step}: {why}; leave it out")
    parts = build(load(source, settings, command))
    if is_run:
        inputs.check_model(source, parts)
    with jax.set_mesh(parts.mesh):
        if not is_run:
            return parts, load_policy(parts), 0
        abstract = lora.trained(abstract_params(parts, parts.cfg), parts.cfg)
        params, step = restore_params(source / "checkpoints", abstract, step)
        return parts, lora.join(load_base(parts), params), step


def required_sets(parts: Parts) -> dict[str, Encoded]:
    """Return `load_sets`. Raises `ConfigError` if the config names no set."""
    if not parts.config.eval.sets:
        raise ConfigError("eval.sets: none; name one, such as eval.sets.mine.path=questions.jsonl")
    with stage("reading eval.sets") as show:
        return load_sets(parts, show)


def run_folder(source: Path, parts: Parts) -> Path:
    """Return the folder of a run, or the folder that a run of this config would get."""
    return source if source.is_dir() else Path(parts.config.runs) / parts.config.name


def new_folder(source: Path, parts: Parts, name: str, out: Path | None, result: str) -> Path:
    """Make and return the folder for results: `out`, or else `name` in the run's folder.

    Raises `ConfigError` if the file `result` exists there already.
    """
    folder = out or run_folder(source, parts) / name
    if jax.process_index() == 0:  # Process 0 decides, since others might look after it has written.
        if (folder / result).exists():
            raise ConfigError(f"{folder}: it holds {result} already; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def chosen_on(source: Path, step: int, sets: dict[str, SetConfig]) -> list[str]:
    """Return the evaluated sets on which this checkpoint was chosen as the best, so its score is biased."""
    if not source.is_dir():
        return []
    trained = load(source)
    name = (trained.checkpoint.best or "").removeprefix("eval.").rpartition(".")[0]
    if name not in trained.eval.sets or best_step(source / "checkpoints") != step:
        return []
    same = dataclasses.replace(trained.eval.sets[name], limit=None)
    return [n for n, spec in sets.items() if dataclasses.replace(spec, limit=None) == same]


def provenance(parts: Parts, sets: dict[str, Encoded]) -> dict[str, Any]:
    """Return what eval.json needs for a repetition: the settings, the prompt's wording, and hashes.

    The hashes are of each set's questions and prompt tokens, with the options in the file's order.
    """
    hashes = lambda e: {"data": fingerprint(e.questions), "prompts": fingerprint(e.tokens)}
    blank = Question("", "{question}", ("{option A}", "{option B}"), 0)
    template = text.render(blank, parts.config.prompt.template)
    digests = {name: hashes(encoded) for name, encoded in sets.items()}
    return {"config": configs.to_tree(parts.config), "template": template, "sets": digests}


def evaluate_without_images(parts: Parts, decode_params: Params, encoded: Encoded) -> dict[str, look.Shares]:
    """Return the shares of right answers to the questions with images under each of `look.conditions`."""
    unseen = {}
    for name, questions in look.conditions(encoded.questions).items():
        other = encode(parts.tokenizer, questions, parts.config, encoded.shuffle, parts.cfg.vision)
        # With the shapes of the set itself, no other program is compiled.
        images = other.images and dataclasses.replace(other.images, windows=encoded.windows)
        other = dataclasses.replace(other, width=max(other.width, encoded.width), images=images)
        unseen[name] = look.by_question(evaluate(parts, decode_params, other)[1] if other.questions else [])
    return unseen


def evaluate_source(source: Path, settings: list[str], step: Which, out: Path | None) -> int:
    """Run `medrlvr eval`: write a JSONL of answers for each set and eval.json, and print tables."""
    parts, params, step = open_policy(source, settings, step, "eval")
    sets = required_sets(parts)
    folder = new_folder(source, parts, f"eval-{step}", out, "eval.json")
    leads, console, results, statistics = jax.process_index() == 0, Console(), {}, {}
    looks: dict[str, dict[str, Any]] = {}
    with jax.set_mesh(parts.mesh):
        decode_params = make_weight_sync(parts, parts.cfg)(params)
        for name, encoded in sets.items():
            console.notify(f"eval.sets.{name}: {encoded.how_read}")
            progress = partial(console.progress, f"eval {name}")
            results[name], rows = evaluate(parts, decode_params, encoded, progress, entropies=True)
            statistics[name] = answers.describe(answers.from_rows(rows, name))
            if encoded.images:
                unseen = evaluate_without_images(parts, decode_params, encoded)
                looks[name] = look.describe(encoded.questions, look.by_question(rows), unseen)
                rows = look.add_unseen(rows, unseen)
                every = parts.config.eval.samples * -(-len(encoded.questions) // MAX_THUMBNAILS)
                rows[::every] = with_thumbnails(rows[::every], encoded.questions)
            if leads:
                files.write_text(folder / f"{name}.jsonl", files.jsonl(rows))
    console.close()
    if not leads:
        return 0
    bias = f"checkpoint {step} was chosen as the best on these questions: its accuracy here is too high"
    warnings = [f"{name}: {bias}" for name in chosen_on(source, step, parts.config.eval.sets)]
    warnings += look.warnings(looks)
    prefix = text.response_prefix(parts.tokenizer, parts.config.prompt)
    if conflict := prefix_conflict(prefix, parts.config.reward.mode):
        warnings.append("; ".join(conflict))
    tree = {"source": str(source), "step": step, "versions": log.versions(), "warnings": warnings}
    tree |= provenance(parts, sets) | {"eval": results, "statistics": statistics}
    files.write_json(folder / "eval.json", tree | ({"looks": looks} if looks else {}))
    say(answers.show(statistics))
    if looks:
        say(look.show(looks))
    remarks = chain.from_iterable(answers.remarks(name, counts) for name, counts in results.items())
    say("\n".join([*remarks, *(f"warning: {w}" for w in warnings), f"answers: {folder}"]))
    return 0
