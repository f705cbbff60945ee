"""The metrics of metrics.jsonl: unit and meaning of each, from which the documentation lists them; and when
an alarm among them is reported.
"""

from fnmatch import fnmatchcase
from typing import NamedTuple

LASTS = 6  # an alarm is reported in the step in which it has lasted so long: a healthy run has shorter ones
AGAIN = 10  # steps after which an alarm that lasts is reported again
AT_ONCE = ("constant_reward", "reward_clipped", "sampler_ratio_far")  # faults of the set-up


class Metric(NamedTuple):
    name: str  # as in metrics.jsonl; `*` stands for the name of a set, a stage, a reward component, an alarm
    unit: str
    meaning: str


METRICS = tuple(
    Metric(*row)
    for row in (
        ("step", "number", "The step: 1, 2, …; 0 is the evaluation before training."),
        ("seconds", "s", "Time of the step, without its evaluation."),
        ("tokens", "tokens", "Tokens of all responses of the step; of fine-tuning, tokens of the targets."),
        ("tokens_per_second", "tokens / s", "`tokens` ÷ `seconds`."),
        ("completions", "responses", "Responses of the step."),
        ("reward", "reward", "Mean reward of the step's responses, before the KL penalty."),
        ("reward/*", "reward", "Mean value of one component of the reward, before its weight."),
        ("reward_std", "reward", "Standard deviation of the rewards."),
        ("reward_failed", "share", "Responses on which the user's reward failed."),
        ("verifier_share", "share", "Responses that were sent to the verifier (NAME_share with a name)."),
        ("verifier_unclear", "share", "Responses that were sent to it and got no verdict."),
        ("reward_clipped", "share", "Rewards that were cut to ± advantage.reward_clip."),
        ("unlearned", "share", "Responses that are not learned from: left out, or a reward failed."),
        ("accuracy", "share", "Right answers among the sampled responses."),
        ("format_ok", "share", "Responses in the format that reward.mode asks for."),
        ("response_length", "tokens", "Mean length of a response, with its stop token."),
        ("truncated", "share", "Responses that were cut off at the budget of tokens."),
        ("entropy", "nats / token", "Mean entropy of the policy's next-token distribution."),
        ("equal_groups", "share", "Questions whose samples all have the same reward: they teach nothing."),
        ("dropped_groups", "share", "Questions left out by advantage.drop_equal_groups or advantage.spread."),
        ("batches", "batches", "Batches that the step drew; sample.max_batches allows several."),
        ("next_batch", "number", "Number of the batch with which the next step begins: 0, 1, …"),
        ("spread", "reward", "Standard deviation of a question's rewards, mean over the step's questions."),
        ("spread_mean", "reward", "Running mean of `spread`, by which advantage.spread decides."),
        ("no_contrast", "0 or 1", "1: no two rewards that are compared differ."),
        ("advantage_mean", "reward", "Mean advantage of a token."),
        ("advantage_std", "reward", "Standard deviation of the advantages."),
        ("kl", "nats / token", "KL divergence of the policy from the reference, as kl.estimator has it."),
        ("kl_response", "nats / response", "The same, summed over a response."),
        ("kl_coef", "number", "Coefficient β of the KL penalty; it moves if kl.target is set."),
        ("kl_penalty", "reward", "Mean KL penalty of a response, where it is part of the reward."),
        ("sampler_gap", "nats", "Largest difference of a token's log-prob between sampler and trainer."),
        ("sampler_ratio_far", "share", "Tokens whose probability differs by over 10 % between the two."),
        (
            "row/*",
            "row",
            "The row that shows a metric best: its largest (`_high`) or smallest (`_low`) value.",
        ),
        ("stage/*", "share", "Responses in one of the paper's six stages, told by their text alone."),
        ("monitor/hacks", "share", "Answers without reasoning, or with reasoning outside of <think>."),
        ("monitor/leak", "share", "Thoughts that state the answer long before their end."),
        ("monitor/hedging", "share", "Responses that hedge often (perhaps, might be, unclear)."),
        ("monitor/repetition", "share", "Responses of whose runs of four words over half come again."),
        ("monitor/letter_p", "p", "χ² test of whether the answered letters are spread as the keys."),
        ("monitor/letter_shift", "share", "Answers that would have to change to be spread as the keys."),
        ("monitor/constant_reward", "steps", "For how many steps in a row the rewards have taught nothing."),
        ("alarm/*", "steps", "For how many steps in a row this alarm has lasted."),
        ("policy/surrogate", "reward", "The policy's objective, which the update raises."),
        ("policy/loss", "reward", "What the policy's update lowers: −surrogate, with KL and entropy terms."),
        ("policy/ratio", "ratio", "Mean probability of a token after ÷ before the step's updates."),
        ("policy/ratio_far", "share", "Tokens whose ratio is over 10 % away from 1."),
        ("policy/clip_low", "share", "Tokens whose ratio was clipped from below."),
        ("policy/clip_high", "share", "Tokens whose ratio was clipped from above."),
        (
            "policy/approx_kl",
            "nats / token",
            "KL divergence between the policy before and in the update (k3).",
        ),
        ("policy/kl_ref", "nats / token", "KL divergence from the reference in the update."),
        ("policy/entropy", "nats / token", "Entropy of the policy in the update."),
        ("critic/value", "reward", "Mean value that the critic predicts."),
        ("critic/value_error", "reward²", "Mean squared error of the values."),
        ("critic/value_clip", "share", "Tokens whose value moved beyond loss.value_clip."),
        ("critic/return", "reward", "Mean return that the critic learns."),
        ("critic/return_square", "reward²", "Mean square of the returns."),
        (
            "critic/explained_variance",
            "share",
            "1 − variance of the error ÷ variance of the returns; at best 1.",
        ),
        ("critic/loss", "reward²", "What the critic's update lowers."),
        ("nll", "nats / token", "Fine-tuning: negative log-likelihood of the targets."),
        ("loss", "nats / token", "Fine-tuning: what the update lowers."),
        ("*learning_rate", "1 / update", "Learning rate of the step's last update."),
        ("*grad_norm", "norm", "Global norm of the gradient before clipping, mean over the updates."),
        ("*skipped", "share", "Updates that were not finite, and left out."),
        ("eval.*.n", "answers", "Answers in the evaluation of a set."),
        ("eval.*.questions", "questions", "Questions of the set."),
        ("eval.*.correct", "answers", "Right answers."),
        ("eval.*.format_ok", "answers", "Answers in the format."),
        (
            "eval.*.accuracy",
            "share",
            "Right answers; `_low` and `_high` are its 95 % interval over questions.",
        ),
        ("eval.*.format_rate", "share", "Answers in the format; `format_low`, `format_high`: its interval."),
        ("eval.*_low", "share", "Lower end of a 95 % interval."),
        ("eval.*_high", "share", "Upper end of a 95 % interval."),
        ("eval.*.response_length", "tokens", "Mean length of an answer."),
        ("eval.*.truncated", "answers", "Answers that were cut off."),
        (
            "eval.*.dropped_prompts",
            "questions",
            "Questions that were not asked: longer than prompt.max_tokens.",
        ),
    )
)


def find(name: str) -> Metric | None:
    """What is known of a metric by its name in metrics.jsonl."""
    return next((metric for metric in METRICS if fnmatchcase(name, metric.name)), None)


def is_due(name: str, lasted: int) -> bool:
    """Whether an alarm is reported that has lasted so many steps: once it has lasted `LASTS`, those of
    `AT_ONCE` when they begin, and then every `AGAIN` steps.
    """
    first = 1 if name.removeprefix("monitor/") in AT_ONCE else LASTS
    return lasted >= first and (lasted - first) % AGAIN == 0
