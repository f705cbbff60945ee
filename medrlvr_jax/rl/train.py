"""Med-RLVR (arXiv 2502.19655): reinforcement learning from verifiable rewards, PPO or GRPO by what the config holds.

    for each step:
        sample G responses to each of Q questions            experience.collect
        r ∈ {−1, 0, +1} by the rule                          rewards.grade
        advantages from rewards, KL, and values if any       advantages.compute
        policy ← clipped surrogate, epochs × minibatches     learn.learn
        critic ← clipped squared error, the same way         learn.learn

Departures from the paper as it is known, in one place:
1. Its rates, β, batch and lengths are not published: the presets take OpenRLHF's usual ones.
2. Minibatches are shuffled by question: the samples of one question stay together, for they share their prompt's computation.
3. The critic starts as the policy's body with a value head of zeros; it sees the state before each token, as OpenRLHF's.
4. The reward rule is `strict` unless the config says `paper`; `paper` has the loopholes that the paper reports as hacks.
"""

import dataclasses
import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax import sharding
from medrlvr_jax.build import Parts, build, check_positions, init_learner, load_frozen, make_relay, total_steps
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.batches import step_batch
from medrlvr_jax.data.load import given, read
from medrlvr_jax.data.readers import Records
from medrlvr_jax.evaluation import evaluate, monitors
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import gather
from medrlvr_jax.model import lora
from medrlvr_jax.rewards import user
from medrlvr_jax.rewards.parse import beginning_trap
from medrlvr_jax.rewards.stages import STAGES
from medrlvr_jax.rl.experience import collect
from medrlvr_jax.rl.learn import adapt_kl, offload
from medrlvr_jax.rl.loop import Callback, drive
from medrlvr_jax.rl.losses import explained_variance
from medrlvr_jax.rl.programs import Programs, make_programs, step_programs
from medrlvr_jax.rollout.program import relay_program
from medrlvr_jax.rollout.rollout import Encoded, Scored, encode, reorder
from medrlvr_jax.runs import log
from medrlvr_jax.types import Experience, Frozen, Mean, TrainState

SHOWN = 16  # completions of a process and step on which the user's reward failed that are logged


def train(
    config: Config,
    rewards: user.Function | Sequence[user.Function | tuple[user.Function, float]] | None = None,
    data: Records | str | Path | None = None,
    callbacks: Callback | Sequence[Callback] = (),
) -> dict[str, Any]:
    """Run or resume a training by PPO, GRPO or their kin, as `config` says; writes `runs/<name>/` as `medrlvr train` does.

    `rewards`: what pays in place of `config.reward`'s rule: a callable, or a list of callables and of pairs (callable, weight), whose
    weighted values are added. Each is called with lists of N texts by keyword, those of `completions`, `keys` (letters of the right
    options), `options` and `questions` that its signature names, and returns N finite numbers. user.py says what follows
    where it does not. Accuracies and evaluations stay the rule's.
    `data`: what to train on in place of `config.data.path`: `Question`s, or dicts with the fields of one of the formats in formats.py,
    in a list or a `datasets.Dataset`; or a path as in `config.data.path`. The other settings of `config.data` hold for it too.
    `callbacks`: called as f(step, metrics) after each step, which is 1, 2, …, with the step's line of metrics.jsonl; where one
    returns True, the run saves a checkpoint and stops.

    Returns what summary.json holds; of a run that was stopped before its end, by a callback or by a signal (Ctrl-C), `name`, `steps`,
    `done` and `exit_status`: the same call goes on from there. Raises `ConfigError` for settings, data and rewards that cannot be
    used, `RewardError`, `Diverged`, `CheckpointError` and `Unwritable`.
    """
    configs.check_best(config)
    judges = None if rewards is None else user.Rewards(rewards)
    spec, records = given(config.data, data)
    config = dataclasses.replace(config, data=spec)
    parts = build(config)
    questions, told = read(config.data, records)
    encoded = encode(parts.tokenizer, questions, config, config.data.shuffle_options)
    if not encoded.questions:
        raise ConfigError(f"data.path: no question of {config.data.path} fits prompt.max_tokens = {config.prompt.max_tokens}; raise it")
    check_positions(parts, encoded.longest, config.sample.max_new_tokens, "sample.max_new_tokens")
    steps, warmup = total_steps(config, len(encoded.questions)), config.learn.critic_warmup
    if warmup >= steps:
        raise ConfigError(f"learn.critic_warmup: {warmup} of {steps} steps leave none in which the policy learns; lower it")
    sets = evaluate.load_sets(parts)
    with user.started(config.reward, judges) as judge, jax.set_mesh(parts.mesh):
        made = make_programs(parts, steps)
        programs, state = start(parts, made)
        frozen = load_frozen(parts)

        def one(state: TrainState, step: int, history: log.Records):
            now = at_epoch(parts, encoded, step)
            state, stats, scored, experience = train_step(parts, programs, now, state, frozen, step, judge)
            metrics = summarise(stats, scored) | monitors.watch(scored, config.sample.samples)
            metrics |= monitors.count_idle(metrics, history)
            found = monitors.alarms(metrics, history, config)
            lasted, said = monitors.mark(found, history)
            logs = {"samples": samples(parts, now, scored, step), "questions": [passes(scored, config.sample.samples)]}
            return state, metrics | lasted, logs, experience, tell(said, scored, metrics, config)

        notices = [f"data: {told}"]
        notices += [f"{encoded.dropped} questions dropped: longer than prompt.max_tokens"] if encoded.dropped else []
        if trap := beginning_trap(text.begins(parts.tokenizer, config.prompt), config.reward.mode):
            notices.append("; ".join(trap))
        relay = programs.relay if parts.sampler_cfg == parts.cfg else make_relay(parts, parts.cfg)  # evaluation is of the policy itself
        ahead = step_programs(parts, made, encoded.width) + evaluate.programs(parts, sets)
        ahead += relay_program(relay) if sets and relay is not programs.relay else []
        ended = lambda params: relay(lora.join(frozen.base, params))  # noqa: E731
        rows = encoded.questions, encoded.tokens
        named = judges.record if judges else []
        return drive("train", parts, rows, sets, steps, state, one, ended, ahead, notices, callbacks, named)


def start(parts: Parts, programs: Programs) -> tuple[Programs, TrainState]:
    """The learners at their start, and the programs as a step calls them."""
    config = parts.config
    policy, learn_policy = offload(config, init_learner(parts, parts.cfg, programs.policy_tx)[0], programs.learn_policy)
    critic, learn_critic = None, None
    if programs.critic_tx:
        critic, learn_critic = offload(config, init_learner(parts, parts.critic_cfg, programs.critic_tx)[0], programs.learn_critic)
    programs = dataclasses.replace(programs, learn_policy=learn_policy, learn_critic=learn_critic)
    kl_coef = jax.device_put(jnp.float32(parts.config.kl.coef), sharding.replicated(parts.mesh))
    return programs, TrainState(policy, critic, kl_coef)


def at_epoch(parts: Parts, encoded: Encoded, step: int) -> Encoded:
    """The questions of step `step` with their options in their epoch's order, where `data.shuffle_options` asks for it."""
    if not encoded.shuffle:
        return encoded
    n = len(encoded.questions)
    return reorder(parts, encoded, step_batch(parts.config, n, step), step // (n // parts.config.sample.questions))


def train_step(
    parts: Parts,
    programs: Programs,
    encoded: Encoded,
    state: TrainState,
    frozen: Frozen,
    step: int,
    judge: user.Judge | None = None,
) -> tuple[TrainState, dict[str, Any], Scored, Experience]:
    """Step `step` of the method box above; batch and noise are functions of (seed, step), so a resumed run is the same run."""
    c = parts.config
    index = step_batch(c, len(encoded.questions), step)
    key = jax.random.fold_in(jax.random.key(c.seed), step)
    critic = None if state.critic is None else state.critic.params
    policy = state.policy.params
    experience, stats, scored = collect(programs.relay, frozen, policy, critic, parts, encoded, index, key, state.kl_coef, judge)
    shuffle = jax.random.fold_in(key, 2**31)  # beyond every question's number: sampling and shuffling never share a key
    policy, learned = state.policy, {}
    if step >= c.learn.critic_warmup:
        policy, learned["policy"] = programs.learn_policy(state.policy, frozen.base, experience, shuffle, state.kl_coef)
    critic = state.critic
    if critic is not None:
        critic, learned["critic"] = programs.learn_critic(state.critic, frozen.base, experience, shuffle, None)
    kl_coef = state.kl_coef
    if c.kl.target is not None:
        kl_coef = adapt_kl(kl_coef, stats["kl_response"], c.sample.questions * c.sample.samples, c.kl)
    stats |= {"kl_coef": state.kl_coef} | learned
    return TrainState(policy, critic, kl_coef), stats, scored, experience


def summarise(stats: dict[str, Any], scored: Scored) -> dict[str, float]:
    """One flat record of a step: the rollout's shares and means, then `policy/…` and `critic/…`."""
    v = scored.verdicts
    failed = np.isnan(v.reward)
    rows = {
        "reward": np.where(failed, 0, v.reward),
        "reward_failed": failed,
        "accuracy": v.correct,
        "format_ok": v.format_ok,
        "response_length": scored.lengths,
    }
    rows |= {"truncated": ~scored.stopped, "completions": np.ones(len(scored.places))}
    rows |= {f"monitor/{name}": column for name, column in monitors.flags(scored).items()}
    if None not in scored.stages:
        rows |= {f"stage/{name}": np.array([s == name for s in scored.stages], bool) for name in STAGES}
    totals = gather({name: float(column.sum()) for name, column in rows.items()})  # one set from each process
    shared = [name for name in rows if all(name in total for total in totals)]  # a process without rows cannot say that stages are none
    sums = {name: sum(total[name] for total in totals) for name in shared}
    n = int(sums.pop("completions"))
    out = {name: total / n for name, total in sums.items()} | {"completions": n, "tokens": int(sums["response_length"])}
    out["reward"] = sums["reward"] / max(n - sums["reward_failed"], 1)
    stats = sharding.to_host(stats)
    critic = stats.get("critic")
    if critic is not None:
        out["critic/explained_variance"] = float(explained_variance({k: Mean(*v) for k, v in critic.items()}))
    for name, value in stats.items():
        if isinstance(value, dict):
            out |= {f"{name}/{k}": float(mean.total / max(mean.count, 1e-9)) for k, mean in value.items()}
        elif name != "reward":
            out[name] = float(value)
    return out


def tell(said: list[monitors.Alarm], scored: Scored, metrics: dict[str, float], config: Config) -> list[str]:
    """Each alarm in words, with the rows that show it best, from whichever processes have them."""
    found = [
        [[int(scored.places[i]), scored.completions[i]] for i in monitors.examples(alarm, scored, metrics, config.sample.samples)]
        for alarm in said
    ]
    told = gather(found) if said else []
    texts = []
    for i, alarm in enumerate(said):
        rows = sorted(chain.from_iterable(part[i] for part in told))[: monitors.EXAMPLES]
        shown = [f"\n    row {place}: {textwrap.shorten(completion, 160)!r}" for place, completion in rows]
        texts.append(f"ALARM: {alarm.text}" + "".join(shown))
    return texts


def samples(parts: Parts, encoded: Encoded, scored: Scored, step: int) -> list[dict[str, Any]]:
    """Records for samples.jsonl: the first sample of questions spread over the step's batch, from whichever process has each; and, at
    any step, completions on which the user's reward failed."""
    c = parts.config
    index = step_batch(c, len(encoded.questions), step)
    wanted = np.linspace(0, len(index) - 1, min(c.log.samples, len(index))).astype(int) * c.sample.samples
    wanted = [] if not c.log.samples_every or step % c.log.samples_every else wanted
    shown = np.isin(scored.places, wanted)
    shown[list(scored.failed)[:SHOWN]] = True
    rows = [sample_record(parts, encoded, index, scored, row) for row in np.flatnonzero(shown).tolist()]
    return sorted(chain.from_iterable(gather(rows)), key=lambda r: r["row"])


def passes(scored: Scored, samples: int) -> dict[str, Any]:
    """The step's record for questions.jsonl: how many of each question's samples were right (`medrlvr difficulty --history`)."""
    own = zip((scored.places // samples).tolist(), scored.questions, scored.verdicts.correct.tolist(), strict=True)
    right: dict[tuple[int, str], int] = {}
    for place, question, correct in chain.from_iterable(gather([(place, q.id, correct) for place, q, correct in own])):
        right[place, question] = right.get((place, question), 0) + correct
    return {"samples": samples, "right": {name: n for (_, name), n in sorted(right.items())}}


def sample_record(parts: Parts, encoded: Encoded, index: np.ndarray, scored: Scored, row: int) -> dict[str, Any]:
    """One completion of the questions at `index`, by its place among this process's; `row` is then its place in the whole batch."""
    place = int(scored.places[row])
    tokens = encoded.tokens[index[place // parts.config.sample.samples]]
    return {"row": place, "prompt": parts.tokenizer.show(tokens), "prompt_length": len(tokens)} | scored.record(row)
