"""The commands that ask a model, or compare answers: eval, probe, compare, difficulty, contamination."""

from pathlib import Path

from medrlvr_jax.cli.app import (
    EVALUATE,
    Distributed,
    Flag,
    Paths,
    Settings,
    Source,
    Step,
    Whole,
    command,
    load,
)
from medrlvr_jax.host.files import write_json


@command(EVALUATE)
def eval_(
    source: Source,
    /,
    *settings: Settings,
    step: Step = None,
    out: Path | None = None,
    distributed: Distributed = False,
) -> int:
    """Answer the questions of eval.sets, and report accuracies.

    Prints accuracy and format rate with 95 % intervals over questions, entropy
    per token, accuracy by subject, and how often each letter is answered and
    is right. With eval.samples above 1 also pass@k, pass@k beyond chance, and
    maj@k. A set that holds exact repeats is also counted without them.

    Writes one JSONL of answers for each set, and eval.json: all results, the
    settings, the prompt's wording, and hashes of questions and prompts.

        medrlvr eval runs/quickstart
        medrlvr eval runs/quickstart eval.samples=16 eval.temperature=1

    Args:
        out: The folder to write. Default: RUN/eval-STEP.
    """
    load(source, settings, "eval")
    from medrlvr_jax.evaluation.evaluate import evaluate_source

    return evaluate_source(source, list(settings), step, out)


@command(EVALUATE)
def probe(
    source: Source,
    /,
    *settings: Settings,
    step: Step = None,
    out: Path | None = None,
    scorer: str | None = None,
    distributed: Distributed = False,
) -> int:
    """Test whether the model's reasoning changes its answers.

    The model answers the questions of eval.sets greedily. Then it must answer
    at once (by its most probable letter) after the first 0, 25, 50, 75 and
    100 % of its own thought, and after the thought on another question. If
    that does not change the accuracy, the thought does no work. InfoGain
    (arXiv 2506.02126) says how much each sentence raises the probability of
    the right answer.

    Args:
        out: The folder to write: one JSONL for each set, and probe.json. Default: RUN/probe-STEP.
        scorer: The model that computes InfoGain: a directory or hub name. Compare models by the same one.
    """
    load(source, settings, "probe")
    from medrlvr_jax.evaluation.probe import probe_source

    return probe_source(source, list(settings), step, out, scorer)


@command(EVALUATE)
def compare(a: Path, b: Path, /, *more: Path, anyway: Flag = False, json: Flag = False) -> int:
    """Compare two runs, or two evaluations, on the same questions by paired tests; or several in one table.

        medrlvr compare runs/quickstart runs/quickstart_grpo
        medrlvr compare runs/base runs/ct runs/mri              # by set and subject: train × test

    Of a run, the newest evaluation is taken; one that has none is evaluated
    first, as `medrlvr eval` does. Questions are paired by id and content. p comes from McNemar's exact test
    where each question has one answer, otherwise from a t test over questions.
    Evaluations that differ in questions, prompt, number of samples, decoding
    or rule are refused, since then more than the model differs.

    Args:
        a: A run's folder, or one that `medrlvr eval` wrote, such as runs/quickstart/eval-32.
        b: The other model's.
        more: Further ones. The table then has the gains of all over the first.
        anyway: Compare the questions that are in both, although more than the model differs.
        json: Print everything as one JSON object, with pass@k, majority and letters.
    """
    from medrlvr_jax.evaluation import compare as paired
    from medrlvr_jax.host.files import jsonl
    from medrlvr_jax.host.tables import say

    first, second, *others = folders = [paired.evaluation(folder) for folder in (a, b, *more)]
    if others:
        result = paired.matrix(folders, anyway)
        text = paired.show_matrix(result)
    else:
        result = paired.compare(first, second, anyway)
        names = paired.names_of(folders)
        text = f"{first} against {second}\n\n{paired.show(result, names)}"
    print(jsonl([result]), end="") if json else say(text)
    return 0


@command(EVALUATE)
def difficulty(
    source: Source,
    /,
    *settings: Settings,
    step: Step = None,
    samples: Whole = 16,
    history: Flag = False,
    out: Path | None = None,
    distributed: Distributed = False,
) -> int:
    """Count how many samples are right for each training question.

    Samples the questions of `data` as in training. The file that it writes
    chooses training questions, here those with 1 to 7 right samples, or orders
    them (order: easy_first):
        medrlvr train CONFIG.yaml 'data.pass_count={file: FILE, keep: [1, 7]}'
    An interrupted count continues with the same command.

    Args:
        samples: Number of samples for each question.
        history: Sample nothing: compute each question's variance (1-shot RLVR) and impact (LIMR) from the
            run's questions.jsonl, for data.pass_count={file: FILE, order: variance, top: 16}.
        out: The JSONL to write. Default: RUN/difficulty-STEP.jsonl, with --history RUN/history.jsonl.
    """
    load(source, settings, "difficulty")
    from medrlvr_jax.evaluation.difficulty import difficulty_source, from_history

    if history:
        return from_history(source, out)
    return difficulty_source(source, list(settings), step, samples, out)


@command(EVALUATE)
def contamination(*sets: Paths, eval: Path | None = None, out: Path | None = None) -> int:
    """Find test questions that the training set holds too, exactly or nearly.

    Two questions match if their stems have the same words, or if the longer
    stem holds more than half of the shorter one's 8-grams (those of over 1 %
    of the stems do not count). Short stems must also share an option. The
    training set is compared with itself as well.

    Args:
        sets: Files of questions: training set, then test sets. Or one config: its data against its eval.sets.
        eval: A folder that `medrlvr eval` wrote: print its accuracies with and without matching questions.
        out: The JSON file to write: every matching question, and the training question that it is like.
    """
    from medrlvr_jax.evaluation import contamination as overlap
    from medrlvr_jax.host.tables import say

    result = overlap.contamination([str(path) for path in sets], eval)
    say(overlap.show(result))
    if out:
        write_json(out, result)
        print(f"questions: {out}")
    return 0
