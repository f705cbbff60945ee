"""The settings that each command reads, and the checks on combinations of settings.

One config file serves all commands. Each command requires, checks and lists in its help only the settings
that it reads.
"""

from collections.abc import Iterator
from typing import Any

from medrlvr_jax.config.reward import (
    AnswerConfig,
    FormatConfig,
    LengthConfig,
    PenaltyConfig,
    ProbabilityConfig,
    RepetitionConfig,
    RewardConfig,
    RuleConfig,
)
from medrlvr_jax.config.schema import EVAL_METRICS, GROUP_ESTIMATORS, STEP_METRICS, Config
from medrlvr_jax.host.errors import ConfigError, nearest

MODEL = ("name", "runs", "seed", "model", "prompt", "reward", "mesh", "eval")
ROWS = ("learn.minibatch", "learn.microbatch", "learn.row_sizes")  # sizes of forward passes over responses
RUN = ("steps", "passes", "data", "checkpoint", "log")
BATCH = ("sample.questions", "sample.max_new_tokens", "sample.layout")
TRAIN = (*MODEL, *RUN, "sample", "advantage", "kl", "loss", "learn")
# The settings and sections that each command reads. A command that is not listed may read all.
READS = {
    "train": TRAIN,
    "plan": TRAIN,
    "sft": (*MODEL, *RUN, *BATCH, *ROWS, "sft", "learn.epochs", "learn.policy", "learn.offload"),
    "eval": (*MODEL, *BATCH, *ROWS),
    "probe": (*MODEL, *BATCH, *ROWS),
    "difficulty": (*MODEL, *ROWS, "data", "sample"),
    "score": ("name", "model.path", "reward"),
    "data": ("name", "runs", "seed", "model.path", "prompt", "data", "eval.sets", "sft"),
}


def reads(command: str | None, name: str) -> bool:
    """Return whether a command reads the setting or section `name`, or a field inside it."""
    known = READS.get(command or "", (name,))
    return any(f"{name}.".startswith(f"{k}.") or f"{k}.".startswith(f"{name}.") for k in known)


def find_problems(c: Config) -> Iterator[tuple[str, str]]:
    """Yield a setting and a message for each combination of settings that cannot work in any command."""
    if (c.steps is None) == (c.passes is None):
        yield "steps", f"{c.steps} and passes: {c.passes}: give exactly one of the two"
    if (c.prompt.template, c.reward.mode == "direct") in (("direct", False), ("think", True)):
        form = "an answer without reasoning" if c.reward.mode == "direct" else "reasoning and an answer"
        remedy = "reward.mode=direct" if c.prompt.template == "direct" else "prompt.template=direct"
        asks = f"prompt.template {c.prompt.template} does not ask for that"
        yield "reward.mode", f"{c.reward.mode} rewards {form}, but {asks}; set {remedy}"
    if c.prompt.template not in ("think", "direct", "none") and "{question}" not in c.prompt.template:
        names = "think, direct, none, or your own text that contains {question}"
        yield "prompt.template", f"{c.prompt.template!r}: use {names}"
    for name, value in (("system", c.prompt.system), ("template_args", c.prompt.template_args or None)):
        if value is not None and not c.prompt.chat:
            yield f"prompt.{name}", "needs the chat template; set prompt.chat=true, or remove this setting"
    yield from _reward_problems(c.reward)
    for i, part in enumerate(c.reward.components):
        yield from ((f"reward.components.{i}{field}", text) for field, text in _component_problems(c, part))
    if c.model.lora and not c.model.lora.targets:
        yield "model.lora.targets", "[] would train nothing; name some matrices, or set model.lora to null"
    yield from _sampling_problems(c)
    yield from _objective_problems(c)
    if c.log.profile and c.log.profile[0] > c.log.profile[1]:
        yield "log.profile", f"{list(c.log.profile)}: the first step is after the last; swap them"
    yield from _set_problems(c)


# Settings of the single reward that have no effect beside reward.components, and the component that replaces
# each of them.
REPLACED = {
    "unformatted": "{{kind: rule, unformatted: {}}}",
    "wrong": "{{kind: rule, wrong: {}}}",
    "correct": "{{kind: rule, correct: {}}}",
    "leak_penalty": "{{kind: leak, weight: {}}}",
    "before_penalty": "{{kind: before, weight: {}}}",
    "fn": "{{kind: function, fn: {}}}",
    "random": None,
}


def _reward_problems(reward: RewardConfig) -> Iterator[tuple[str, str]]:
    exclusive = [name for name in ("fn", "random") if getattr(reward, name) is not None]
    penalties = [name for name in ("leak_penalty", "before_penalty") if getattr(reward, name)]
    if exclusive and (others := [f"reward.{name}" for name in (*exclusive[1:], *penalties)]):
        yield f"reward.{exclusive[0]}", f"defines the whole reward; remove {', '.join(others)}"
    if not reward.components:
        return
    for name, component in REPLACED.items():
        if (value := getattr(reward, name)) != getattr(RewardConfig(), name):
            remedy = f"add {component.format(value)} to them" if component else "remove one of the two"
            yield f"reward.{name}", f"{value} has no effect beside reward.components; {remedy}"
    if all(not part.weight or isinstance(part, PenaltyConfig) for part in reward.components):
        why = "only penalties and weights of 0, so no completion has a positive reward"
        yield "reward.components", f"{why}; add a component such as {{kind: rule}}"


def _why_constant(part: Any, limit: int) -> str | None:
    """Return why a component has the same value for all completions of at most `limit` tokens, else None."""
    match part:
        case RuleConfig() if part.unformatted == part.wrong == part.correct:
            return f"unformatted, wrong and correct are all {part.correct:g}"
        case FormatConfig() if part.broken == part.kept:
            return f"broken and kept are both {part.kept:g}"
        case AnswerConfig() if part.wrong == part.correct and part.accept != "mention":
            return f"wrong and correct are both {part.correct:g}"
        case AnswerConfig(accept="mention") if part.wrong == part.correct == part.among_text:
            return f"wrong, correct and among_text are all {part.correct:g}"
        case LengthConfig() if not part.shorter and part.budget >= limit:
            return f"no response has over {part.budget} tokens, for sample.max_new_tokens = {limit}"
        case RepetitionConfig() if part.words + part.times - 1 > limit:
            return f"{limit} tokens (sample.max_new_tokens) cannot hold {part.words} words {part.times} times"
    return None


def _component_problems(c: Config, part: Any) -> Iterator[tuple[str, str]]:
    """Yield a field of a reward component, such as `.score`, or "" for the whole component, and a message."""
    if why := _why_constant(part, c.sample.max_new_tokens):
        yield "", f"{part.kind}: {why}, so all completions have the same value; change or remove it"
    if part.kind in ("probability", "consistency") and c.reward.mode == "direct":
        yield "", f"{part.kind} needs reasoning, but reward.mode direct allows none; remove the component"
    if isinstance(part, ProbabilityConfig):
        if part.score == "logmean" and not part.baseline:
            why = "a mean of log-probabilities is never above 0, so without a baseline the reward is always 0"
            yield ".score", f"{why}; set baseline to true"
        if part.of == "letter" and part.baseline and c.data.shuffle_options:
            why = "data.shuffle_options changes the letters, but the baseline is computed only once"
            yield ".of", f"letter: {why}; set of to text, or baseline to false"


def _sampling_problems(c: Config) -> Iterator[tuple[str, str]]:
    sample, learn = c.sample, c.learn
    sizes = [("learn.minibatch", learn.minibatch, "sample.questions", sample.questions)]
    if learn.microbatch:
        sizes.append(("learn.microbatch", learn.microbatch, "learn.minibatch", learn.minibatch))
    for name, size, larger, total in sizes:
        if total % size:
            near = f"the nearest divisors are {nearest_divisors(size, total)}"
            yield name, f"{size} does not divide {larger} = {total}; {near}"
    if sample.min_new_tokens >= sample.max_new_tokens:
        limit = f"must be below sample.max_new_tokens = {sample.max_new_tokens}"
        yield "sample.min_new_tokens", f"{sample.min_new_tokens} {limit}"
    if sample.weights == "int8" and c.loss.sampler_cap is None:
        why = "int8 samples from a policy that differs from the trained one"
        yield "sample.weights", f"{why}; set loss.sampler_cap, for example to 2.0"
    if sample.max_batches > 1 and not (c.advantage.drop_equal_groups and c.advantage.spread is None):
        why = "further batches only replace questions that advantage.drop_equal_groups leaves out"
        remedy = "set that to true and advantage.spread to null, or sample.max_batches to 1"
        yield "sample.max_batches", f"{sample.max_batches}: {why}; {remedy}"
    if sample.temperature == 0:
        why = "0 is greedy, so all samples of a question are equal"
        yield "sample.temperature", f"{why}; set it above 0 (eval.temperature may be 0)"


def _objective_problems(c: Config) -> Iterator[tuple[str, str]]:
    if c.kl.coef > 0 and c.kl.into == "loss" and c.kl.estimator == "k1":
        why = "k1 in the loss has an expected gradient of zero"
        yield "kl.estimator", f"{why}; use k3 (GRPO) or k2, or set kl.into=reward"
    if c.kl.target is not None and not (c.kl.coef > 0 and c.kl.into == "reward"):
        yield "kl.target", f"{c.kl.target}: the adaptive coefficient needs kl.coef > 0 and kl.into reward"
    if c.loss.surrogate == "cispo" and (c.loss.ratio_cap or c.loss.dual_clip):
        yield "loss.surrogate", "cispo does not use loss.ratio_cap or loss.dual_clip; set them to null"


def _set_problems(c: Config) -> Iterator[tuple[str, str]]:
    for name, spec in c.question_sets.items():
        chosen = spec.pass_count
        if chosen and chosen.top and not chosen.order:
            yield f"{name}.pass_count.top", f"{chosen.top} needs an order; set order, such as variance"
        if chosen and not chosen.keep and not chosen.order:
            remedy = "set keep, such as [1, 7], or order"
            yield f"{name}.pass_count", f"has no effect without keep and order; {remedy}"
        if chosen and chosen.keep and chosen.keep[0] > chosen.keep[1]:
            yield (
                f"{name}.pass_count.keep",
                f"{list(chosen.keep)}: the minimum is above the maximum; swap them",
            )
    fixed = [name for name, spec in c.eval.sets.items() if not spec.shuffle_options]
    if c.eval.samples > 1 and c.eval.temperature == 0 and (fixed or not c.eval.sets):
        remedy = f"set eval.temperature above 0, or shuffle_options of {', '.join(fixed) or 'the sets'}"
        yield "eval.samples", f"{c.eval.samples} greedy samples are all equal; {remedy}"


def check_rl(c: Config) -> None:
    """Raise `ConfigError` if estimator, samples and critic do not fit together. Only `train` reads them."""
    out, estimator = [], c.advantage.estimator
    if estimator == "gae" and c.learn.critic is None:
        out.append("advantage.estimator: gae needs learn.critic, such as {lr: 9e-6}; or use group")
    if estimator != "gae" and c.learn.critic is not None:
        remedy = "set learn.critic to null, or use estimator gae"
        out.append(f"learn.critic: {estimator} does not use a critic; {remedy}")
    if estimator in GROUP_ESTIMATORS and c.sample.samples < 2:
        why = f"{estimator} compares the samples of a question; set at least 2"
        out.append(f"sample.samples: {c.sample.samples}: {why}")
    if c.learn.critic_warmup and c.learn.critic is None:
        why = "steps would train nothing, because learn.critic is null; set it to 0"
        out.append(f"learn.critic_warmup: {c.learn.critic_warmup} {why}")
    if out:
        raise ConfigError("\n".join(out))


def check_best(c: Config, step_metrics: tuple[str, ...] = STEP_METRICS) -> None:
    """Raise `ConfigError` if the training will not record the metric checkpoint.best.

    Only trainings call this: other commands may replace a run's evaluation sets.
    `step_metrics`: the metrics of a training step that checkpoint.best may name.
    """
    best = c.checkpoint.best
    known = [*(f"eval.{name}.{metric}" for name in c.eval.sets for metric in EVAL_METRICS), *step_metrics]
    if best is not None and best not in known:
        remedy = f"there are {', '.join(known)}" if known else "name a set of eval.sets, or set it to null"
        hint = f"{nearest(best, known)} {remedy}".strip()
        raise ConfigError(f"checkpoint.best: {best}: this run has no such metric; {hint}")


def nearest_divisors(wanted: int, n: int) -> str:
    """Return the two divisors of n that are nearest to `wanted`, as text for a message."""
    near = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))[:2]
    return ", ".join(map(str, sorted(near)))
