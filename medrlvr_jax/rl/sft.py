"""Supervised fine-tuning and pretraining: the second half of a training step, with another objective.

Targets by `sft.target`: the answer alone (the paper's baseline), the rationale and the answer, or the
responses that `text` lines bring (how the embedded model was pretrained). A batch is `sample.questions` rows,
learned in minibatches.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medrlvr_jax import sharding
from medrlvr_jax.build import (
    Parts,
    abstract_base,
    abstract_learner,
    build,
    check_positions,
    init_learner,
    load_base,
    total_steps,
    updates_in,
)
from medrlvr_jax.config import check
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.batches import step_batch
from medrlvr_jax.data.load import given, read, read_text
from medrlvr_jax.data.question import fingerprint
from medrlvr_jax.data.readers import Records
from medrlvr_jax.evaluation import evaluate
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import require_equal
from medrlvr_jax.model import lora
from medrlvr_jax.rl.learn import compile_learn, make_optimizer, nll_objective, offload
from medrlvr_jax.rl.loop import Callback, Job, StepResult, run_job
from medrlvr_jax.rollout.program import Program, a_key, array, sync_program
from medrlvr_jax.rollout.rollout import Encoded, width
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs import log
from medrlvr_jax.runs.console import stage
from medrlvr_jax.types import Experience, TrainState


def encode_pairs(
    parts: Parts, records: Records | None = None
) -> tuple[list[tuple[list[int], list[int]]], int, str]:
    """(prompt, target) tokens of every row, how many were dropped for their length, and how the set was read.

    `records` stand in place of what `data.path` names."""
    c, tok = parts.config, parts.tokenizer
    if c.data.shuffle_options:
        raise ConfigError(
            "data.shuffle_options: fine-tuning encodes its rows once, and rationales may name "
            "letters; set it to false"
        )
    if c.sft.target == "text":
        examples, how_read = read_text(c.data, records)
        prompts = [ids or [tok.stop_ids[0]] for ids in tok.encode_texts([e.prompt for e in examples])]
        targets = [e.response for e in examples]
    else:
        questions, how_read = read(c.data, records)
        prompts = text.encode_questions(tok, questions, c.prompt)
        targets = text.to_teach(tok, [text.sft_target(q, c.sft.target) for q in questions], c.prompt)
    rows = list(zip(prompts, tok.encode_targets(targets), strict=True))
    fitting = [r for r in rows if len(r[0]) <= c.prompt.max_tokens and len(r[1]) <= c.sft.max_new_tokens]
    if not fitting:
        raise ConfigError("data: no row fits prompt.max_tokens and sft.max_new_tokens; raise them")
    prompt, target = map(len, max(fitting, key=lambda r: len(r[0]) + len(r[1])))
    check_positions(parts, prompt, target, "sft.max_new_tokens")
    require_equal(lambda: {"rows": fingerprint(fitting)})
    return fitting, len(rows) - len(fitting), how_read


def batch(
    rows: list[tuple[list[int], list[int]]], index: np.ndarray, widths: tuple[int, int], pad_id: int
) -> Experience:
    """Rows as experience with one response each; what only RL has is None."""
    prompts = text.pad_prompts([rows[i][0] for i in index], index.astype(np.uint32), widths[0], pad_id)
    tokens = np.full((len(index), 1, widths[1]), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, i in enumerate(index):
        target = rows[i][1]
        tokens[row, 0, : len(target)], mask[row, 0, : len(target)] = target, True
    return Experience(prompts, tokens, mask, None, None, None, None, None)


def sft(
    config: Config, data: Records | str | Path | None = None, callbacks: Callback | Sequence[Callback] = ()
) -> dict[str, Any]:
    """Run or resume a fine-tuning; writes `runs/<name>/` as `medrlvr sft` does. Arguments, result and errors
    are those of `train`.

    With `sft.target: text`, rows of `data` are dicts with the fields `prompt` and `response`.
    """
    check.check_best(config, of_steps=())  # they draw no responses
    log.check(config, "sft")
    spec, records = given(config.data, data)
    config = dataclasses.replace(config, data=spec)
    parts = build(config)
    with stage(f"reading {config.data.path} and the sets of eval.sets"):
        rows, dropped, how_read = encode_pairs(parts, records)
        sets = evaluate.load_sets(parts)
    notices = [f"data: {how_read}"]
    if dropped:
        notices.append(f"{dropped} rows dropped: longer than prompt.max_tokens or sft.max_new_tokens")
    with jax.set_mesh(parts.mesh):
        with stage(f"loading {config.model.path}"):
            job = make_job(parts, rows, sets)
        return run_job(dataclasses.replace(job, notices=notices), callbacks)


def make_job(parts: Parts, rows: list[tuple[list[int], list[int]]], sets: dict[str, Encoded]) -> Job:
    """The fine-tuning as the loop runs it."""
    config, pad_id = parts.config, parts.tokenizer.pad_id
    steps, n = total_steps(config, len(rows)), config.sample.questions
    widths = width(max(len(prompt) for prompt, _ in rows)), width(max(len(target) for _, target in rows))
    tx = make_optimizer(config.learn.policy, updates_in(config, steps))
    learner, placed = init_learner(parts, parts.cfg, tx)
    program = compile_learn(config, nll_objective(config, parts.cfg), tx, placed)
    learner, learn = offload(config, learner, program)
    base, sync_weights = load_base(parts), make_weight_sync(parts, parts.cfg)

    def step(state: TrainState, step: int, history: log.Records) -> StepResult:
        index = step_batch(config, len(rows), step)
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        mine, _ = sharding.own_rows(n, parts.mesh)
        targets = sharding.place_rows(batch(rows, index[mine], widths, pad_id), n, parts.mesh)
        learner, means = learn(state.policy, base, targets, key, None)
        means = sharding.to_host(means)
        metrics = {k: float(m.value()) for k, m in means.items()} | {"tokens": int(means["nll"].count)}
        return StepResult(TrainState(learner, None, state.kl_coef), metrics, targets)

    shapes = batch(rows, np.zeros(n, int), widths, pad_id)
    shapes = jax.tree.map(lambda x: array(parts, x.dtype, *x.shape), shapes)
    args = abstract_learner(parts, parts.cfg, tx), abstract_base(parts), shapes, a_key(parts), None
    ahead = [Program("learn", program, args)]
    return Job(
        command="sft",
        parts=parts,
        steps=steps,
        rows=(rows, rows),
        sets=sets,
        state=TrainState(learner, None, jax.device_put(np.float32(0), sharding.replicated(parts.mesh))),
        step=step,
        policy=lambda state: sync_weights(lora.join(base, state.policy.params)),
        programs=ahead + (sync_program(sync_weights) + evaluate.programs(parts, sets) if sets else []),
    )
