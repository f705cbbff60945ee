"""The commands that evaluate and compare: eval, probe, compare, difficulty, contamination."""

from pathlib import Path

from medrlvr_jax.cli.app import (
    EVALUATE,
    Distributed,
    Flag,
    Paths,
    PositiveInteger,
    Settings,
    Source,
    Step,
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
    """Answer the questions of eval.sets and report accuracies.

    It prints accuracy and format rate with 95 % intervals over questions,
    entropy per token, accuracy by subject, and how often each letter is given
    and is right. With eval.samples above 1 it also prints pass@k, pass@k above
    chance and maj@k. If a set contains exact repeats, it also prints the
    accuracy without them.

    It writes a JSONL file of answers for each set, and eval.json with all
    results, the settings, the prompt, and hashes of questions and prompts.

        medrlvr eval runs/quickstart
        medrlvr eval runs/quickstart eval.samples=16 eval.temperature=1

    Args:
        out: The output folder. Default: RUN/eval-STEP.
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

    The model answers the questions of eval.sets greedily. Then its reasoning
    is cut after 0, 25, 50, 75 and 100 %, or replaced by the reasoning on
    another question, and the most probable letter is taken as the answer. If
    the accuracy does not change, the answers do not depend on the reasoning.
    InfoGain (arXiv 2506.02126) measures how much each sentence raises the
    probability of the right answer.

    Args:
        out: The output folder, with a JSONL file for each set and probe.json. Default: RUN/probe-STEP.
        scorer: The model that computes InfoGain, the same for all models to compare: a directory or hub name.
    """
    load(source, settings, "probe")
    from medrlvr_jax.evaluation.probe import probe_source

    return probe_source(source, list(settings), step, out, scorer)


@command(EVALUATE)
def compare(a: Path, b: Path, /, *more: Path, anyway: Flag = False, json: Flag = False) -> int:
    """Compare two or more runs or evaluations on the same questions.

    Two are compared by paired tests. For three and more, a table shows each
    one's gain over the first, by set and subject.

        medrlvr compare runs/quickstart runs/quickstart_grpo
        medrlvr compare runs/base runs/ct runs/mri

    A run is represented by its newest evaluation. A run without one is
    evaluated first, as with `medrlvr eval`. Questions are paired by id and
    content. p comes from McNemar's exact test if each question has one answer,
    else from a t test over questions. Evaluations that differ in questions,
    prompt, number of samples, decoding or rule are refused, because then not
    only the model differs.

    Args:
        a: A run's folder, or a folder of `medrlvr eval`, such as runs/quickstart/eval-32.
        b: The folder of the second model.
        more: The folders of further models.
        anyway: Compare the questions that both have, although not only the model differs.
        json: Print all results as one JSON object, with pass@k, maj@k and letters.
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
    samples: PositiveInteger = 16,
    history: Flag = False,
    out: Path | None = None,
    distributed: Distributed = False,
) -> int:
    """Count how many samples are right for each training question.

    It samples answers to the questions of `data` as training does. The file
    that it writes can order the training questions or select some of them,
    for example those with 1 to 7 right samples:
        medrlvr train CONFIG.yaml 'data.pass_count={file: FILE, keep: [1, 7]}'
    The same command continues an interrupted count.

    With --history it samples nothing. It computes the variance (1-shot RLVR)
    and the impact (LIMR) of each question from the run's questions.jsonl. The
    settings data.pass_count.order and data.pass_count.top use them.

    Args:
        samples: Number of samples for each question.
        history: Compute variance and impact from the run's questions.jsonl.
        out: The output file. Default: RUN/difficulty-STEP.jsonl, or RUN/history.jsonl with --history.
    """
    load(source, settings, "difficulty")
    from medrlvr_jax.evaluation.difficulty import difficulty_source, from_history

    if history:
        return from_history(source, out)
    return difficulty_source(source, list(settings), step, samples, out)


@command(EVALUATE)
def contamination(*sets: Paths, eval: Path | None = None, out: Path | None = None) -> int:
    """Find test questions that are also in the training set, exactly or nearly.

    Two questions match if their stems have the same words, or if the longer
    stem contains more than half of the shorter stem's 8-grams. 8-grams that
    are in over 1 % of the stems do not count. Short stems must also have an
    option in common. Repeats inside the training set are reported too.

    Args:
        sets: The file of the training set, then files of test sets. Or one config, with data and eval.sets.
        eval: A folder of `medrlvr eval`. Its accuracies are printed with and without the matching questions.
        out: The JSON file to write. It lists every matching question with its training question.
    """
    from medrlvr_jax.evaluation import contamination as overlap
    from medrlvr_jax.host.tables import say

    result = overlap.contamination([str(path) for path in sets], eval)
    say(overlap.show(result))
    if out:
        write_json(out, result)
        print(f"matching questions: {out}")
    return 0
