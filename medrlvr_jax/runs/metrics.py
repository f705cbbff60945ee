"""The metrics of metrics.jsonl with unit and meaning, for the documentation; and when alarms are reported."""

from fnmatch import fnmatchcase
from typing import NamedTuple

LASTS = 6  # steps after which an alarm is reported; a healthy run also has shorter alarms
AGAIN = 10  # steps after which a lasting alarm is reported again
AT_ONCE = ("constant_reward", "reward_clipped", "sampler_ratio_far")  # alarms about faults of the setup


class Metric(NamedTuple):
    name: str  # `*` stands for the name of a set, a stage, a reward component or an alarm
    unit: str
    meaning: str


METRICS = (
    Metric("step", "number", "The step: 1, 2, …. 0 is the evaluation before training."),
    Metric("seconds", "s", "Duration of the step without its evaluation."),
    Metric("tokens", "tokens", "Tokens of all responses of the step. Fine-tuning: tokens of the targets."),
    Metric("tokens_per_second", "tokens / s", "`tokens` ÷ `seconds`."),
    Metric("completions", "responses", "Responses of the step."),
    Metric("reward", "reward", "Mean reward of the step's responses, before the KL penalty."),
    Metric("reward/*", "reward", "Mean value of one reward component, before its weight."),
    Metric("reward_std", "reward", "Standard deviation of the rewards."),
    Metric("reward_failed", "share", "Responses for which the user's reward function failed."),
    Metric("verifier_share", "share", "Responses sent to the verifier. A named verifier has NAME_share."),
    Metric("verifier_unclear", "share", "Responses sent to the verifier that got no clear verdict."),
    Metric("reward_clipped", "share", "Rewards that were clipped to ± advantage.reward_clip."),
    Metric("unlearned", "share", "Responses that are not trained on: left out, or a reward failed."),
    Metric("accuracy", "share", "Sampled responses with the right answer."),
    Metric("format_ok", "share", "Responses in the format of reward.mode."),
    Metric("response_length", "tokens", "Mean length of a response with its stop token."),
    Metric("truncated", "share", "Responses cut off at the maximum length."),
    Metric("entropy", "nats / token", "Mean entropy of the policy's next-token distribution."),
    Metric("equal_groups", "share", "Questions whose samples all have the same reward. They teach nothing."),
    Metric("dropped_groups", "share", "Questions left out by drop_equal_groups or spread of advantage."),
    Metric("batches", "batches", "Batches that the step sampled; sample.max_batches allows several."),
    Metric("next_batch", "number", "Number of the batch that the next step starts with: 0, 1, …."),
    Metric("spread", "reward", "Standard deviation of a question's rewards, mean over the step's questions."),
    Metric("spread_mean", "reward", "Running mean of `spread`, which advantage.spread compares with."),
    Metric("no_contrast", "0 or 1", "1: no two compared rewards differ."),
    Metric("advantage_mean", "reward", "Mean advantage of a token."),
    Metric("advantage_std", "reward", "Standard deviation of the advantages."),
    Metric("kl", "nats / token", "KL divergence of the policy from the reference, by kl.estimator."),
    Metric("kl_response", "nats / response", "KL divergence summed over a response."),
    Metric("kl_coef", "number", "Coefficient β of the KL penalty. It changes if kl.target is set."),
    Metric("kl_penalty", "reward", "Mean KL penalty of a response, if the penalty is part of the reward."),
    Metric("sampler_gap", "nats", "Largest difference of a token's log-probability in sampler and trainer."),
    Metric("sampler_ratio_far", "share", "Tokens whose probability in the two differs by over 10 %."),
    Metric("row/*", "row", "Row with the largest (`_high`) or smallest (`_low`) value of a metric."),
    Metric("stage/*", "share", "Responses in one of the paper's six stages, classified by their text."),
    Metric("monitor/hacks", "share", "Answers without reasoning, or with reasoning outside <think>."),
    Metric("monitor/leak", "share", "Reasoning that states the answer long before its end."),
    Metric("monitor/hedging", "share", "Responses that hedge often (perhaps, might be, unclear)."),
    Metric("monitor/repetition", "share", "Responses in which over half of the 4-grams are repeats."),
    Metric("monitor/letter_p", "p", "χ² test of the answers' letters against the right letters."),
    Metric("monitor/letter_shift", "share", "Answers to change until both have the same letter frequencies."),
    Metric("monitor/constant_reward", "steps", "Steps in a row in which the rewards taught nothing."),
    Metric("alarm/*", "steps", "Number of steps in a row for which this alarm has lasted."),
    Metric("policy/surrogate", "reward", "The policy's objective, which the update maximises."),
    Metric("policy/loss", "reward", "The policy's loss: −surrogate, with KL and entropy terms."),
    Metric("policy/ratio", "ratio", "Mean ratio of a token's probability after and before the updates."),
    Metric("policy/ratio_far", "share", "Tokens whose ratio differs from 1 by over 10 %."),
    Metric("policy/sampler_weight", "ratio", "Mean of min(π_old / π_sampler, loss.sampler_cap) over tokens."),
    Metric("policy/clip_low", "share", "Tokens whose ratio was clipped from below."),
    Metric("policy/clip_high", "share", "Tokens whose ratio was clipped from above."),
    Metric("policy/approx_kl", "nats / token", "KL divergence from the policy before the update (k3)."),
    Metric("policy/kl_ref", "nats / token", "KL divergence from the reference during the update."),
    Metric("policy/entropy", "nats / token", "Entropy of the policy during the update."),
    Metric("critic/value", "reward", "Mean value that the critic predicts."),
    Metric("critic/value_error", "reward²", "Mean squared error of the values."),
    Metric("critic/value_clip", "share", "Tokens whose value changed by more than loss.value_clip."),
    Metric("critic/return", "reward", "Mean return, the critic's target."),
    Metric("critic/return_square", "reward²", "Mean square of the returns."),
    Metric("critic/explained_variance", "share", "1 − variance of the errors ÷ variance of the returns."),
    Metric("critic/loss", "reward²", "The critic's loss."),
    Metric("nll", "nats / token", "Fine-tuning: negative log-likelihood of the targets."),
    Metric("loss", "nats / token", "Fine-tuning: the loss."),
    Metric("*learning_rate", "1 / update", "Learning rate of the step's last update."),
    Metric("*grad_norm", "norm", "Global norm of the gradient before clipping, mean over the updates."),
    Metric("*skipped", "share", "Updates that were skipped because they were not finite."),
    Metric("eval.*.n", "answers", "Answers in the evaluation of a set."),
    Metric("eval.*.questions", "questions", "Questions of the set."),
    Metric("eval.*.correct", "answers", "Right answers."),
    Metric("eval.*.format_ok", "answers", "Answers in the right format."),
    Metric("eval.*.accuracy", "share", "Right answers. `_low`, `_high`: 95 % interval over questions."),
    Metric("eval.*.format_rate", "share", "Answers in the format. `format_low`, `format_high`: interval."),
    Metric("eval.*_low", "share", "Lower end of a 95 % interval."),
    Metric("eval.*_high", "share", "Upper end of a 95 % interval."),
    Metric("eval.*.response_length", "tokens", "Mean length of an answer."),
    Metric("eval.*.truncated", "answers", "Answers that were cut off."),
    Metric("eval.*.dropped_prompts", "questions", "Questions not asked: longer than prompt.max_tokens."),
)


def find(name: str) -> Metric | None:
    """Return the metric with this name in metrics.jsonl, or None."""
    return next((metric for metric in METRICS if fnmatchcase(name, metric.name)), None)


def is_due(name: str, lasted: int) -> bool:
    """Return whether to report an alarm that has lasted for this many steps.

    Alarms of `AT_ONCE` are reported in their first step and others after `LASTS` steps, then every `AGAIN`.
    """
    first = 1 if name.removeprefix("monitor/") in AT_ONCE else LASTS
    return lasted >= first and (lasted - first) % AGAIN == 0
