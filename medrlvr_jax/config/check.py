"""Which settings each command reads, and which combinations of settings cannot work.

All commands read one kind of file, so that one config serves `train`, `eval` and others. Each command needs,
checks and lists in its help only what it reads.
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
ROWS = ("learn.minibatch", "learn.microbatch", "learn.row_sizes")  # how passes over responses are cut
RUN = ("steps", "passes", "data", "checkpoint", "log")
BATCH = ("sample.questions", "sample.max_new_tokens", "sample.layout")
TRAIN = (*MODEL, *RUN, "sample", "advantage", "kl", "loss", "learn")
# The settings and sections that a command reads. A command that is not here may read all.
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
    """Whether a command reads the setting or section `name`, or some field of it."""
    known = READS.get(command or "", (name,))
    return any(f"{name}.".startswith(f"{k}.") or f"{k}.".startswith(f"{name}.") for k in known)


def problems(c: Config) -> Iterator[tuple[str, str]]:
    """The setting and the complaint for each combination that cannot work, in whatever command reads it."""
    if (c.steps is None) == (c.passes is None):
        yield "steps", f"{c.steps} and passes: {c.passes}: give exactly one of the two"
    if (c.prompt.template, c.reward.mode == "direct") in (("direct", False), ("think", True)):
        pays = "an answer without a thought" if c.reward.mode == "direct" else "a thought and an answer"
        remedy = "reward.mode=direct" if c.prompt.template == "direct" else "prompt.template=direct"
        asks = f"which prompt.template {c.prompt.template} does not ask for"
        yield "reward.mode", f"{c.reward.mode} pays for {pays}, {asks}; set {remedy}"
    if c.prompt.template not in ("think", "direct", "none") and "{question}" not in c.prompt.template:
        names = "think, direct, none, or a wording of your own with {question} in it"
        yield "prompt.template", f"{c.prompt.template!r}: take {names}"
    for name, value in (("system", c.prompt.system), ("template_args", c.prompt.template_args or None)):
        if value is not None and not c.prompt.chat:
            yield f"prompt.{name}", "it needs the chat template; set prompt.chat to true, or take it out"
    yield from _reward(c.reward)
    for i, part in enumerate(c.reward.components):
        yield from ((f"reward.components.{i}{field}", text) for field, text in _component(c, part))
    if c.model.lora and not c.model.lora.targets:
        yield "model.lora.targets", "[] would train nothing; name some matrices, or set model.lora to null"
    yield from _sampling(c)
    yield from _objective(c)
    if c.log.profile and c.log.profile[0] > c.log.profile[1]:
        yield "log.profile", f"{list(c.log.profile)}: the first step comes first, then the last"
    yield from _sets(c)


# Settings of one reward that reward.components replace, and how a component says the same.
REPLACED = {
    "unformatted": "{{kind: rule, unformatted: {}}}",
    "wrong": "{{kind: rule, wrong: {}}}",
    "correct": "{{kind: rule, correct: {}}}",
    "leak_penalty": "{{kind: leak, weight: {}}}",
    "before_penalty": "{{kind: before, weight: {}}}",
    "fn": "{{kind: function, fn: {}}}",
    "random": None,
}


def _reward(reward: RewardConfig) -> Iterator[tuple[str, str]]:
    pays_alone = [name for name in ("fn", "random") if getattr(reward, name) is not None]
    penalties = [name for name in ("leak_penalty", "before_penalty") if getattr(reward, name)]
    if pays_alone and len(pays_alone + penalties) > 1:
        others = "take the other of fn, random, leak_penalty and before_penalty out"
        yield f"reward.{pays_alone[0]}", f"it alone says what is paid; {others}"
    if not reward.components:
        return
    for name, spelling in REPLACED.items():
        if (value := getattr(reward, name)) != getattr(RewardConfig(), name):
            remedy = f"write {spelling.format(value)} among them" if spelling else "take one of the two out"
            yield f"reward.{name}", f"{value}: reward.components say what is paid; {remedy}"
    paying = [part for part in reward.components if part.weight and not isinstance(part, PenaltyConfig)]
    if not paying:
        why = "weights of 0 and penalties alone pay nothing"
        yield "reward.components", f"{why}; add one that pays, such as {{kind: rule}}"


def _constant(part: Any, limit: int) -> str | None:
    """Why a component has one value for every completion of at most `limit` tokens, if it has."""
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


def _component(c: Config, part: Any) -> Iterator[tuple[str, str]]:
    """The fields of a component of the reward that cannot work, as `.score`; "" is the component itself."""
    if constant := _constant(part, c.sample.max_new_tokens):
        yield "", f"{part.kind}: {constant}; it teaches nothing; let them differ, or take it out"
    if part.kind in ("probability", "consistency") and c.reward.mode == "direct":
        yield "", f"{part.kind} needs a thought, and reward.mode direct pays for none; take it out"
    if isinstance(part, ProbabilityConfig):
        if part.score == "logmean" and not part.baseline:
            why = "a mean of log-probabilities is never above 0, so without baseline it pays nothing"
            yield ".score", f"{why}; set baseline to true"
        if part.of == "letter" and part.baseline and c.data.shuffle_options:
            why = "data.shuffle_options changes letters, and the baseline is taken once"
            yield ".of", f"letter: {why}; set of to text, or baseline to false"


def _sampling(c: Config) -> Iterator[tuple[str, str]]:
    sample, learn = c.sample, c.learn
    sizes = [("learn.minibatch", learn.minibatch, "sample.questions", sample.questions)]
    if learn.microbatch:
        sizes.append(("learn.microbatch", learn.microbatch, "learn.minibatch", learn.minibatch))
    for name, size, larger, total in sizes:
        if total % size:
            near = f"the nearest that do: {nearest_divisors(size, total)}"
            yield name, f"{size} does not divide {larger} = {total}; {near}"
    if sample.min_new_tokens >= sample.max_new_tokens:
        limit = f"must be below sample.max_new_tokens = {sample.max_new_tokens}"
        yield "sample.min_new_tokens", f"{sample.min_new_tokens} {limit}"
    if sample.weights == "int8" and c.loss.sampler_cap is None:
        why = "int8 samples from another policy than the one that learns"
        yield "sample.weights", f"{why}; set loss.sampler_cap, 2.0 is usual"
    if sample.temperature == 0:
        why = "0 is greedy, and greedy rollouts teach nothing"
        yield "sample.temperature", f"{why}; set it above 0 (eval.temperature may be 0)"


def _objective(c: Config) -> Iterator[tuple[str, str]]:
    if c.kl.coef > 0 and c.kl.into == "loss" and c.kl.estimator == "k1":
        why = "k1 in the loss has an expected gradient of zero"
        yield "kl.estimator", f"{why}; take k3 (GRPO) or k2, or put it into reward"
    if c.kl.target is not None and not (c.kl.coef > 0 and c.kl.into == "reward"):
        yield "kl.target", f"{c.kl.target}: the adaptive coefficient needs kl.coef > 0 and kl.into reward"
    if c.loss.surrogate == "cispo" and (c.loss.ratio_cap or c.loss.dual_clip):
        yield "loss.surrogate", "cispo has no use for loss.ratio_cap or loss.dual_clip; set them to null"


def _sets(c: Config) -> Iterator[tuple[str, str]]:
    sets = {"data": c.data} | {f"eval.sets.{name}": spec for name, spec in c.eval.sets.items()}
    for name, spec in sets.items():
        chosen = spec.pass_count
        if chosen and chosen.top and not chosen.order:
            yield f"{name}.pass_count.top", f"{chosen.top} of which? give order, such as variance"
        if chosen and not chosen.keep and not chosen.order:
            remedy = "give keep, such as [1, 7], or order"
            yield f"{name}.pass_count", f"neither keep nor order, so it does nothing; {remedy}"
        if chosen and chosen.keep and chosen.keep[0] > chosen.keep[1]:
            yield f"{name}.pass_count.keep", f"{list(chosen.keep)}: the least comes first, then the most"
    same = [name for name, spec in c.eval.sets.items() if not spec.shuffle_options]
    if c.eval.samples > 1 and c.eval.temperature == 0 and (same or not c.eval.sets):
        remedy = f"set eval.temperature above 0, or shuffle_options of {', '.join(same) or 'the sets'}"
        yield "eval.samples", f"{c.eval.samples} greedy samples are all the same; {remedy}"


def check_rl(c: Config) -> None:
    """Refuse estimator, samples and critic that do not fit together. Only `medrlvr train` reads them."""
    out, estimator = [], c.advantage.estimator
    if estimator == "gae" and c.learn.critic is None:
        out.append("advantage.estimator: gae needs learn.critic, such as {lr: 9e-6}; or take group")
    if estimator != "gae" and c.learn.critic is not None:
        remedy = "set learn.critic to null, or take estimator gae"
        out.append(f"learn.critic: {estimator} has no use for a critic; {remedy}")
    if estimator in GROUP_ESTIMATORS and c.sample.samples < 2:
        why = f"{estimator} compares samples of one question, so at least 2 are needed"
        out.append(f"sample.samples: {c.sample.samples}: {why}")
    if c.learn.critic_warmup and c.learn.critic is None:
        why = "steps would teach nothing, for learn.critic is null; set it to 0"
        out.append(f"learn.critic_warmup: {c.learn.critic_warmup} {why}")
    if out:
        raise ConfigError("\n".join(out))


def check_best(c: Config, of_steps: tuple[str, ...] = STEP_METRICS) -> None:
    """Refuse a checkpoint.best that the run does not record, so that no checkpoint would be kept for it.

    `of_steps`: metrics that the training steps record. Not for other commands: they may replace a run's sets.
    """
    best = c.checkpoint.best
    known = [*(f"eval.{name}.{share}" for name in c.eval.sets for share in EVAL_METRICS), *of_steps]
    if best is not None and best not in known:
        remedy = f"there are {', '.join(known)}" if known else "name a set of eval.sets, or set it to null"
        hint = f"{nearest(best, known)} {remedy}".strip()
        raise ConfigError(f"checkpoint.best: {best}: no such metric here; {hint}")


def nearest_divisors(wanted: int, n: int) -> str:
    """The two divisors of n that are nearest to `wanted`, for messages."""
    near = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))[:2]
    return ", ".join(map(str, sorted(near)))
