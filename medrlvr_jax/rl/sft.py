"""Supervised fine-tuning and pretraining: the second half of a training step, with another objective.

`sft.target` selects the targets: the answer alone (the paper's baseline), the rationale and the answer, or
the responses in the data (`text`; the embedded model was pretrained with these). A step takes
`sample.questions` rows and learns them in minibatches.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int32

from medrlvr_jax import sharding
from medrlvr_jax.build import (
    Parts,
    abstract_base,
    abstract_learner,
    build,
    check_positions,
    count_updates,
    init_learner,
    load_base,
    total_steps,
)
from medrlvr_jax.config import check
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.batches import run_batch
from medrlvr_jax.data.load import read, read_text, resolve_data
from medrlvr_jax.data.patches import measure_images
from medrlvr_jax.data.question import Question, fingerprint, image_digest
from medrlvr_jax.data.readers import Records
from medrlvr_jax.evaluation import evaluate
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import require_equal
from medrlvr_jax.model import lora
from medrlvr_jax.rl.learn import compile_learn, make_optimizer, nll_objective, offload
from medrlvr_jax.rl.loop import Callback, Job, StepResult, run_job
from medrlvr_jax.rollout.program import Program, a_key, abstract_prompts, array, sync_program
from medrlvr_jax.rollout.rollout import Encoded, check_seen, place_prompts, prefetch_images, width
from medrlvr_jax.rollout.see import see_program
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs import log
from medrlvr_jax.runs.console import ShowProgress, show_nothing, stage
from medrlvr_jax.types import Experience, Leaf, Prompts, TrainState


class Pairs(NamedTuple):
    """The training data of a fine-tuning."""

    prompts: Encoded
    targets: list[list[int]]  # the tokens of the response to each prompt

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """Return for each pair its tokens and, if the set has images, the digests of its images."""
        rows = zip(self.prompts.tokens, self.targets, strict=True)
        if self.prompts.images is None:
            return list(rows)
        questions = self.prompts.questions
        return [(*row, [*map(image_digest, q.images)]) for row, q in zip(rows, questions, strict=True)]


def encode_pairs(parts: Parts, records: Records | None = None, show: ShowProgress = show_nothing) -> Pairs:
    """Encode the pairs that are not too long. `records`: in place of those that `data.path` names."""
    of_prompts, of_targets = partial(show, "encoding prompts"), partial(show, "encoding targets")
    c, tok = parts.config, parts.tokenizer
    if c.data.shuffle_options:
        why = "fine-tuning encodes its rows once, and rationales may name letters"
        raise ConfigError(f"data.shuffle_options: {why}; set it to false")
    if c.sft.target == "text":
        examples, how_read = read_text(c.data, records)
        questions = [Question(str(i), e.prompt, images=e.images) for i, e in enumerate(examples, 1)]
        targets = [e.response for e in examples]
    else:
        questions, how_read = read(c.data, records)
        targets = text.strip_prefix(tok, [text.sft_target(q, c.sft.target) for q in questions], c.prompt)
    images = measure_images(questions, parts.cfg.vision) if parts.cfg.vision else None
    check_seen(parts, images)
    image_tokens = images and images.prompt_tokens()
    if c.sft.target == "text":
        encoded = text.encode_texts(tok, questions, image_tokens, of_prompts)
        prompts = [ids or [tok.stop_ids[0]] for ids in encoded]
    else:
        prompts = text.encode_questions(tok, questions, c.prompt, images=image_tokens, progress=of_prompts)
    rows = list(zip(prompts, tok.encode_targets(targets, of_targets), strict=True))
    fits = lambda row: len(row[0]) <= c.prompt.max_tokens and len(row[1]) <= c.sft.max_new_tokens
    fitting = [i for i, row in enumerate(rows) if fits(row)]
    if not fitting:
        raise ConfigError("data: no row fits prompt.max_tokens and sft.max_new_tokens; raise them")
    prompts, targets = map(list, zip(*(rows[i] for i in fitting), strict=True))
    longest = max(zip(prompts, targets, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    check_positions(parts, len(longest[0]), len(longest[1]), "sft.max_new_tokens")
    encoded = Encoded(
        [questions[i] for i in fitting],
        prompts,
        np.arange(len(fitting), dtype=np.uint32),
        len(rows) - len(fitting),
        width(max(map(len, prompts))),
        how_read=how_read,
        images=images and images.subset(fitting),
    )
    pairs = Pairs(encoded, targets)
    require_equal(lambda: {"rows": fingerprint(pairs.rows)})
    return pairs


def pad_targets(
    targets: Sequence[list[int]], columns: int, pad_id: int
) -> tuple[Int32[np.ndarray, "Q 1 R"], Bool[np.ndarray, "Q 1 R"]]:
    """Pad the targets, as one response to each prompt. Return tokens, and a mask that is False on padding."""
    tokens = np.full((len(targets), 1, columns), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, target in enumerate(targets):
        tokens[row, 0, : len(target)], mask[row, 0, : len(target)] = target, True
    return tokens, mask


def as_experience(prompts: Prompts, tokens: Leaf, mask: Leaf) -> Experience:
    """Return rows with one response each. The fields that only RL needs are None."""
    return Experience(prompts, tokens, mask, None, None, None, None, None)


def sft(
    config: Config, data: Records | str | Path | None = None, callbacks: Callback | Sequence[Callback] = ()
) -> dict[str, Any]:
    """Run or resume a fine-tuning. It writes `runs/<name>/` as `medrlvr sft` does.

    Arguments, result and errors are those of `train`. With `sft.target: text`, the rows of `data` are dicts
    with the fields `prompt` and `response`.
    """
    check.check_best(config, step_metrics=())  # steps draw no responses
    log.check(config, "sft")
    spec, records = resolve_data(config.data, data)
    config = dataclasses.replace(config, data=spec)
    parts = build(config)
    with stage(f"reading {config.data.path}") as show:
        pairs = encode_pairs(parts, records, show)
        sets = evaluate.load_sets(parts, show)
    notices = [f"data: {pairs.prompts.how_read}"]
    if dropped := pairs.prompts.dropped:
        notices.append(f"{dropped} rows dropped: longer than prompt.max_tokens or sft.max_new_tokens")
    with jax.set_mesh(parts.mesh):
        with stage(f"loading {config.model.path}"):
            job = make_job(parts, pairs, sets)
        return run_job(dataclasses.replace(job, notices=notices), callbacks)


def make_job(parts: Parts, pairs: Pairs, sets: dict[str, Encoded]) -> Job:
    """Return the fine-tuning as the loop runs it."""
    config, rows, (encoded, targets) = parts.config, pairs.rows, pairs
    steps, n = total_steps(config, len(rows)), config.sample.questions
    columns = width(max(map(len, targets)))
    tx = make_optimizer(config.learn.policy, count_updates(config, steps))
    learner, placed = init_learner(parts, parts.cfg, tx)
    program = compile_learn(config, nll_objective(config, parts.cfg), tx, placed)
    learner, learn = offload(config, learner, program)
    base, sync_weights = load_base(parts), make_weight_sync(parts, parts.cfg)

    def step(state: TrainState, step: int, history: log.Records) -> StepResult:
        index = run_batch(config, len(rows), step)
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        mine, _ = sharding.local_rows(n, parts.mesh)
        padded = pad_targets([targets[i] for i in index[mine]], columns, parts.tokenizer.pad_id)
        placed = sharding.place_rows(padded, n, parts.mesh)
        batch = as_experience(place_prompts(None, parts, encoded, index), *placed)
        learner, means = learn(state.policy, base, batch, key, None)
        means = sharding.to_host(means)
        metrics = {k: float(m.value()) for k, m in means.items()} | {"tokens": int(means["nll"].count)}
        return StepResult(TrainState(learner, None, state.kl_coef), metrics, batch)

    prompts = abstract_prompts(parts, n, encoded.width, encoded.windows).unseen
    shapes = as_experience(prompts, *(array(parts, dtype, n, 1, columns) for dtype in (np.int32, np.bool_)))
    args = abstract_learner(parts, parts.cfg, tx), abstract_base(parts), shapes, a_key(parts), None
    ahead = [Program("learn", program, args)]
    if encoded.windows and parts.cfg.execution.tower == "freeze":
        ahead.append(see_program(parts, n, encoded.windows, "see"))
    return Job(
        command="sft",
        parts=parts,
        steps=steps,
        rows=(rows, rows),
        sets=sets,
        state=TrainState(learner, None, jax.device_put(np.float32(0), sharding.replicated(parts.mesh))),
        step=step,
        policy=lambda state: sync_weights(lora.join(base, state.policy.params)),
        prepare=lambda number: prefetch_images(parts, encoded, run_batch(config, len(rows), number)),
        programs=ahead + (sync_program(sync_weights) + evaluate.programs(parts, sets) if sets else []),
    )
