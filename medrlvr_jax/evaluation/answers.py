"""Statistics of one evaluation, computed from the rows of its answers, and their tables.

The question is the unit. With several samples, a question counts once, by the share of its samples that are
right.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medrlvr_jax.data.question import LETTERS
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.stats import Contrast, Interval
from medrlvr_jax.host import tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import read_jsonl

SAMPLES_NOTE = """\
pass@k is unbiased. "Beyond chance" rescales it: guessing gives 0 %, certainty 100 % (–: chance is over 90 %).
maj@k takes the most frequent of a question's k answers: ties are drawn with equal chances, and responses
without an answer do not vote. Entropies are in nats. Intervals (95 %) are over questions."""
LOW_PASS = 0.2  # of pass@k: below it, most groups of samples have equal rewards, so their advantages are 0


class Answers(NamedTuple):
    """One set as arrays: n questions, k samples of each."""

    ids: np.ndarray  # str [n]
    correct: np.ndarray  # bool [n, k]
    format_ok: np.ndarray  # bool [n, k]
    prompt_answers: np.ndarray  # str [n, k], the answered letters as in the prompt; "" without an answer
    prompt_keys: np.ndarray  # str [n, k], the key's letters as in the prompt: samples may shuffle the options
    answers: np.ndarray  # str [n, k], the same answers by their letters in the file
    key: np.ndarray  # str [n], by its letters in the file
    options: np.ndarray  # int [n], number of letters or labels to choose from; 0 for other questions
    kinds: np.ndarray  # str [n], `Question.kind`
    subjects: np.ndarray  # str [n]
    tasks: np.ndarray  # str [n]
    repeats: np.ndarray  # bool [n], True for an exact repeat of an earlier question
    entropy: np.ndarray  # float [n, k], nats per token of each response; NaN if it was not computed
    shuffled: np.ndarray  # bool [n], whether the options were shuffled
    hashes: np.ndarray  # str [n], `question.question_hash`

    def select(self, mask: np.ndarray) -> "Answers":
        return Answers(*(column[mask] for column in self))


def from_rows(rows: Iterable[dict[str, Any]], source: str) -> Answers:
    """Return the rows of `medrlvr eval` as arrays; questions are in the order of their first rows.

    Raises `ConfigError` if there are no rows, if questions have different numbers of samples, or if one id
    stands for different questions.
    """
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_id.setdefault(str(row["id"]), []).append(row)
    if not by_id:
        raise ConfigError(f"{source}: no answers in it")
    samples = {len(group) for group in by_id.values()}
    if len(samples) > 1:
        remedy = "ids must be unique and each question answered as often"
        raise ConfigError(f"{source}: questions with {sorted(samples)} samples; {remedy}")
    for name, group in by_id.items():
        if len({row.get("question_hash") for row in group}) > 1:
            remedy = "give each question an id of its own"
            raise ConfigError(f"{source}: answers to different questions with the id {name!r}; {remedy}")
    first = [group[0] for group in by_id.values()]

    def per_sample(name: str, empty: Any) -> np.ndarray:
        return np.array([[row.get(name) or empty for row in group] for group in by_id.values()])

    def per_question(name: str) -> np.ndarray:
        return np.array([row.get(name) or "" for row in first])

    def in_file(row: dict[str, Any], name: str) -> str:
        """Return the letters of an answer or key as in the file; another kind of answer unchanged."""
        if not row.get("order") or not row[name]:
            return row[name] or ""
        return ", ".join(sorted(row["order"][LETTERS.index(letter)] for letter in row[name].split(", ")))

    return Answers(
        ids=np.array(list(by_id)),
        correct=per_sample("correct", False),
        format_ok=per_sample("format_ok", False),
        prompt_answers=per_sample("answer", ""),
        prompt_keys=per_sample("key", ""),
        answers=np.array([[in_file(row, "answer") for row in group] for group in by_id.values()]),
        key=np.array([in_file(row, "key") for row in first]),
        options=np.array([row["options"] for row in first]),
        kinds=np.array([row.get("kind") or ("choice" if row["options"] else "open") for row in first]),
        subjects=per_question("subject"),
        tasks=per_question("task"),
        repeats=np.array(["repeats" in row for row in first]),
        entropy=np.array([[row.get("entropy", np.nan) for row in group] for group in by_id.values()], float),
        shuffled=np.array(["order" in row for row in first]),
        hashes=per_question("question_hash"),
    )


def read(path: Path) -> Answers:
    """Return the answers of one set from its JSONL file."""
    return from_rows(read_jsonl(path), str(path))


def newest_evaluation(folder: Path) -> Path | None:
    """Return the folder that holds eval.json: `folder`, else the newest of its subfolders, else None."""
    if (folder / "eval.json").is_file():
        return folder
    files = folder.glob("*/eval.json")
    newest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    return newest and newest.parent


def pair(a: Answers, b: Answers) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pair the questions that both evaluations answered, by id and hash.

    Returns the indices of the m pairs in a and in b, int [m] each and in a's order, and the ids under which
    a and b have different questions, which are not paired.
    """
    place = {name: i for i, name in enumerate(b.ids.tolist())}
    pairs = [(i, place[name]) for i, name in enumerate(a.ids.tolist()) if name in place]
    both = np.array(pairs, int).reshape(-1, 2)
    differ = a.hashes[both[:, 0]] != b.hashes[both[:, 1]]
    return *both[~differ].T, a.ids[both[differ, 0]].tolist()


def summarise(rows: list[dict[str, Any]], dropped: int) -> dict[str, Any]:
    """Return the counts of an evaluation for metrics.jsonl and eval.json.

    `n`, `correct`, `format_ok` and `truncated` count completions. Shares have 95 % intervals over questions
    (`stats.accuracy`). `rows` are in the order of questions, with equally many samples of each.
    """
    n, questions = len(rows), len({row["id"] for row in rows})
    right, formatted = (np.array([row[name] for row in rows]) for name in ("correct", "format_ok"))
    accuracy, form = (stats.accuracy(column.reshape(questions, -1)) for column in (right, formatted))
    return {
        "n": n,
        "questions": questions,
        "correct": int(right.sum()),
        "format_ok": int(formatted.sum()),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "format_rate": form.value,
        "format_low": form.low,
        "format_high": form.high,
        "response_length": sum(row["length"] for row in rows) / n,
        "truncated": sum(not row["stopped"] for row in rows),
        "dropped_prompts": dropped,
    }


def interval(counts: dict[str, Any], key: str = "accuracy") -> Interval:
    """Return the `accuracy` or the `format` rate of `summarise`'s counts with its interval.

    Counts of older versions have no interval. They get Wilson's interval over answers, which is correct for
    one answer to each question.
    """
    count, share = {"accuracy": ("correct", "accuracy"), "format": ("format_ok", "format_rate")}[key]
    if f"{key}_low" in counts:
        return Interval(counts[share], counts[f"{key}_low"], counts[f"{key}_high"])
    return Interval(counts[count] / counts["n"], *stats.wilson(counts[count], counts["n"]))


def remarks(name: str, counts: dict[str, Any]) -> list[str]:
    """Return a sentence on questions that were not asked, and one on answers that were cut off, if any."""
    out = []
    if dropped := counts.get("dropped_prompts"):
        share = f"{dropped:,} of {dropped + counts.get('questions', counts['n']):,} questions"
        why = "longer than prompt.max_tokens; raise it"
        out.append(f"{name}: {share} dropped, not in these figures: {why}")
    if cut := counts.get("truncated"):
        share = f"{cut:,} of {counts['n']:,} answers ({100 * cut / counts['n']:.1f} %)"
        remedy = "so mostly unformatted; raise eval.max_new_tokens"
        out.append(f"{name}: {share} cut off before their end, {remedy}")
    return out


def describe(a: Answers) -> dict[str, Any]:
    """Return all statistics of a set, for eval.json and `show`.

    Several samples add pass@k, majority votes and entropies; shuffled options add the consistency of the
    chosen option. A set with exact repeats has the statistics without them under `distinct`.
    """
    k = a.correct.shape[1]
    out: dict[str, Any] = {"n": len(a.ids), "samples": k, "accuracy": stats.accuracy(a.correct)}
    out["format_ok"] = stats.accuracy(a.format_ok)
    choice, label = a.kinds == "choice", a.kinds == "label"
    if choice.any():
        out["letters"] = stats.letter_bias(a.prompt_answers[choice], a.prompt_keys[choice])
    if np.isfinite(a.entropy).any():
        out["token_entropy"] = float(np.nanmean(a.entropy))
    for name, names in (("kinds", a.kinds), ("subjects", a.subjects), ("tasks", a.tasks)):
        if groups := by_group(a.correct, names):
            out[name] = groups
            if name != "kinds":
                out[f"mean_over_{name}"] = stats.balanced(a.correct, names)
    if groups := by_group(a.correct[label], a.key[label]):
        out["labels"] = groups
        out["balanced_accuracy"] = stats.balanced(a.correct[label], a.key[label])
    if k > 1:
        passed = {j: stats.pass_at_k(a.correct, j) for j in range(1, k + 1)}
        out["pass_at_k"] = {j: stats.mean_share(p) for j, p in passed.items()}
        out["pass_at_k_beyond_chance"] = {j: stats.beyond_chance(p, a.options, j) for j, p in passed.items()}
        out["majority"] = stats.mean_share(stats.majority(a.answers, a.correct))
        out["answer_entropy"] = float(stats.answer_entropy(a.answers).mean())
        if a.shuffled.any():
            same, pairs = stats.consistency(a.answers)
            out["consistency"] = {"all": stats.accuracy(same), "pairs": float(pairs.mean())}
    if a.repeats.any():
        out["distinct"] = describe(a.select(~a.repeats))
    return out


def by_group(correct: np.ndarray, names: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return each group's number of questions and accuracy; {} if there are fewer than two groups."""
    groups = {name: correct[names == name] for name in sorted(set(names.tolist()))}
    if len(groups) < 2:
        return {}
    return {name: {"n": len(c), "accuracy": stats.accuracy(c)} for name, c in groups.items()}


def fine_tune_first(k: int, passed: Interval) -> str | None:
    """Return the advice to fine-tune first if pass@k, over all k samples, is significantly below `LOW_PASS`.

    Chance is not subtracted, because right guesses are rewarded, too: a base model below chance by that
    measure has learned (numbers/vision.md).
    """
    if passed.high >= LOW_PASS:
        return None
    low = f"pass@{k} is {percent(passed)}, below {100 * LOW_PASS:.0f} %"
    return f"{low}: too few answers earn a reward to learn from; fine-tune first (`medrlvr sft`)"


def show(described: dict[str, dict[str, Any]]) -> str:
    """Return the tables of each set's statistics (`describe`), with notes on what the columns mean."""
    sets = with_distinct(described)
    rows = []
    for name, d in sets.items():
        entropy = f"{d['token_entropy']:.3f}" if "token_entropy" in d else "–"
        rows.append([name, f"{d['n']:,}", percent(d["accuracy"]), percent(d["format_ok"]), entropy])
    overview = tables.plain(("set", "asked", "accuracy", "format", "entropy"), rows)
    by = ("kinds", "subjects", "tasks", "labels")
    groups = [_group_table(name, group, d) for name, d in sets.items() for group in by if group in d]
    return "\n\n".join(filter(None, [overview, _samples(sets), *groups, _letters(sets)]))


def with_distinct(sets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the results of all sets, each followed by its results without exact repeats, if it has some."""
    out = {}
    for name, d in sets.items():
        out |= {name: d} | ({f"{name}, distinct": d["distinct"]} if "distinct" in d else {})
    return out


def _samples(sets: dict[str, dict[str, Any]]) -> str:
    """Return the table of pass@k and majority votes, and sentences on it; "" without samples."""
    rows, lines = [], []
    for name, d in sets.items():
        if "pass_at_k" not in d:
            continue
        most = d["samples"]
        for k in sorted({1 << i for i in range(most.bit_length())} | {most}):
            beyond = d["pass_at_k_beyond_chance"][k]
            votes = [percent(d["majority"]), f"{d['answer_entropy']:.3f}"] if k == most else ["", ""]
            shares = [percent(d["pass_at_k"][k]), percent(beyond) if beyond else "–"]
            rows.append([name, str(k), *shares, *votes])
        if same := d.get("consistency"):
            orders = f"the same option in all {most} orders of the options: {percent(same['all'])}"
            lines.append(f"{name}: {orders}; in two orders: {percent(same['pairs'])}")
        if text := fine_tune_first(most, d["pass_at_k"][most]):
            lines.append(f"{name}: {text}")
    columns = ("samples of", "k", "pass@k", "beyond chance", "maj@k", "answer entropy")
    return "\n".join([tables.plain(columns, rows), SAMPLES_NOTE, *lines]) if rows else ""


def _group_table(name: str, group: str, d: dict[str, Any]) -> str:
    rows = [[x or "(none)", f"{s['n']:,}", percent(s["accuracy"])] for x, s in d[group].items()]
    if group == "labels":
        rows.append(["balanced accuracy", "", percent(d["balanced_accuracy"])])
    if mean := d.get(f"mean_over_{group}"):
        rows += [
            [f"mean over {group}", "", percent(mean)],
            ["mean over questions", "", percent(d["accuracy"])],
        ]
    return tables.plain((f"{name}, {group}", "questions", "accuracy"), rows)


def _letters(sets: dict[str, dict[str, Any]]) -> str:
    """Return the table of how often each letter is the answer and the key; "" without letters."""
    bias = {name: d["letters"] for name, d in sets.items() if "letters" in d}
    letters = sorted({letter for b in bias.values() for letter in b["letters"]})
    rows = []
    for name, b in bias.items():
        shares = [b["letters"].get(letter) for letter in letters]
        cells = ["" if s is None else f"{100 * s['answered']:.0f}/{100 * s['key']:.0f}" for s in shares]
        rows.append([name, *cells, f"{b['p']:.1g}"])
    return tables.plain(("% answered/key", *letters, "p (χ²)"), rows) if rows else ""


def percent(x: Interval | Contrast | float) -> str:
    """Return a share or a difference in per cent, with its interval if it has one."""
    if not isinstance(x, Interval | Contrast):
        return f"{100 * x:.1f} %"
    value, low, high = (f"{100 * end:.1f}" for end in x[:3])
    return f"{value} % ({low}{' to ' if x.low < 0 else '–'}{high})"
