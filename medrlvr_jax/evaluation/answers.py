"""What one evaluation says by itself: intervals, pass@k, votes, entropies, letters, and accuracy by kind of
question, by subject, by task and by label; read from the rows of its answers.

The question is the unit. With several samples a question counts once, as the share of its samples that are
right.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medrlvr_jax.data.question import LETTERS
from medrlvr_jax.evaluation import stats
from medrlvr_jax.host import tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import read_jsonl

SAMPLED = """\
pass@k: unbiased; beyond chance: so that guessing is 0 and certainty 100 (–: chance alone reaches over 90 %).
maj@k: the most frequent of a question's k answers; ties are drawn with equal chances, and answers that were
not found do not vote. Entropies are in nats. Intervals (95 %) are over questions."""
GROUPS = ("kinds", "subjects", "tasks", "labels")  # by which accuracy is given
GATE = 0.2  # of pass@k: below, most groups of samples have equal rewards, which teach nothing


class Answers(NamedTuple):
    """One set as arrays over its n questions, k samples each."""

    ids: np.ndarray  # str [n]
    correct: np.ndarray  # bool [n, k]
    format_ok: np.ndarray  # bool [n, k]
    shown: np.ndarray  # str [n, k], the letters that were given, "" where none was found
    # str [n, k], those of the key: where options were shuffled, each sample has its own
    shown_key: np.ndarray
    answers: np.ndarray  # str [n, k], the same options by their letters in the file
    key: np.ndarray  # str [n]
    options: np.ndarray  # int [n], from how many letters or labels one is chosen; 0 of other questions
    kinds: np.ndarray  # str [n], `Question.kind`
    subjects: np.ndarray  # str [n]
    tasks: np.ndarray  # str [n]
    repeats: np.ndarray  # bool [n], the exact repeats of an earlier question
    entropy: np.ndarray  # float [n, k], nats per token of each response; NaN where it was not taken
    shuffled: np.ndarray  # bool [n]
    hashes: np.ndarray  # str [n], `question.question_hash`; "" in answers of versions that wrote none

    def only(self, use: np.ndarray) -> "Answers":
        return Answers(*(column[use] for column in self))


def of_rows(rows: Iterable[dict[str, Any]], where: str) -> Answers:
    """Rows as `medrlvr eval` writes them; questions in the order of their first."""
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_id.setdefault(str(row["id"]), []).append(row)
    if not by_id:
        raise ConfigError(f"{where}: no answers in it")
    k = {len(group) for group in by_id.values()}
    if len(k) > 1:
        remedy = "ids must be unique and each question answered as often"
        raise ConfigError(f"{where}: questions with {sorted(k)} samples; {remedy}")
    hashes = {name: {row.get("question_hash") for row in group} for name, group in by_id.items()}
    if odd := [name for name in by_id if len(hashes[name]) > 1]:
        remedy = "give each question an id of its own"
        raise ConfigError(f"{where}: answers to different questions with the id {odd[0]!r}; {remedy}")
    column = lambda name, empty: np.array([[r.get(name) or empty for r in group] for group in by_id.values()])
    first = [group[0] for group in by_id.values()]

    def in_file(row: dict[str, Any], name: str) -> str:
        """The letter or letters of an answer, as the file has them; another answer as it is."""
        if not row.get("order") or not row[name]:
            return row[name] or ""
        return ", ".join(sorted(row["order"][LETTERS.index(letter)] for letter in row[name].split(", ")))

    return Answers(
        ids=np.array(list(by_id)),
        correct=column("correct", False),
        format_ok=column("format_ok", False),
        shown=column("answer", ""),
        shown_key=column("key", ""),
        answers=np.array([[in_file(r, "answer") for r in group] for group in by_id.values()]),
        key=np.array([in_file(r, "key") for r in first]),
        options=np.array([r["options"] for r in first]),
        kinds=np.array([r.get("kind") or ("choice" if r["options"] else "open") for r in first]),
        subjects=np.array([r.get("subject") or "" for r in first]),
        tasks=np.array([r.get("task") or "" for r in first]),
        repeats=np.array(["repeats" in r for r in first]),
        entropy=np.array([[r.get("entropy", np.nan) for r in group] for group in by_id.values()], float),
        shuffled=np.array(["order" in r for r in first]),
        hashes=np.array([r.get("question_hash") or "" for r in first]),
    )


def read(path: Path) -> Answers:
    """The answers of one set, from its JSONL file."""
    return of_rows(read_jsonl(path), str(path))


def pair(a: Answers, b: Answers) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Places in a and in b of the questions that both answered, int [m] each, in a's order; and the ids under
    which they have different ones (by `hashes`, where both have them), which are no pairs.
    """
    place = {name: i for i, name in enumerate(b.ids.tolist())}
    pairs = [(i, place[name]) for i, name in enumerate(a.ids.tolist()) if name in place]
    both = np.array(pairs, int).reshape(-1, 2)
    in_a, in_b = a.hashes[both[:, 0]], b.hashes[both[:, 1]]
    differ = (in_a != "") & (in_b != "") & (in_a != in_b)
    return *both[~differ].T, a.ids[both[differ, 0]].tolist()


def describe(a: Answers) -> dict[str, Any]:
    """Accuracy and format with their intervals, letters, subjects; of several samples pass@k with chance
    taken out, majority, entropy, and where their options stood in other orders, how often the same option was
    chosen.

    A set that holds exact repeats is described a second time without them, as `distinct`.
    """
    k = a.correct.shape[1]
    out: dict[str, Any] = {"n": len(a.ids), "samples": k, "accuracy": stats.accuracy(a.correct)._asdict()}
    out["format_ok"] = stats.accuracy(a.format_ok)._asdict()
    choice, label = a.kinds == "choice", a.kinds == "label"
    if choice.any():
        out["letters"] = stats.letter_bias(a.shown[choice], a.shown_key[choice])
    if np.isfinite(a.entropy).any():
        out["token_entropy"] = float(np.nanmean(a.entropy))
    by_names = {"subjects": a.subjects, "tasks": a.tasks}
    groups = {name: by_group(a.correct, names) for name, names in (("kinds", a.kinds), *by_names.items())}
    groups["labels"] = by_group(a.correct[label], a.key[label])
    out |= {name: accuracies for name, accuracies in groups.items() if accuracies}
    for name in out.keys() & by_names.keys():
        out[f"mean_over_{name}"] = stats.balanced(a.correct, by_names[name])._asdict()
    if "labels" in out:
        out["balanced_accuracy"] = stats.balanced(a.correct[label], a.key[label])._asdict()
    if k > 1:
        passed = {j: stats.pass_at_k(a.correct, j) for j in range(1, k + 1)}
        out["pass_at_k"] = {j: stats.mean_share(p)._asdict() for j, p in passed.items()}
        beyond = {j: stats.beyond_chance(p, a.options, j) for j, p in passed.items()}
        out["pass_at_k_beyond_chance"] = {j: share and share._asdict() for j, share in beyond.items()}
        out["majority"] = stats.mean_share(stats.majority(a.answers, a.correct))._asdict()
        out["answer_entropy"] = float(stats.answer_entropy(a.answers).mean())
        if a.shuffled.any():
            same, pairs = stats.consistency(a.answers)
            out["consistency"] = {"all": stats.accuracy(same)._asdict(), "pairs": float(pairs.mean())}
    if a.repeats.any():
        out["distinct"] = describe(a.only(~a.repeats))
    return out


def by_group(correct: np.ndarray, names: np.ndarray) -> dict[str, dict[str, Any]]:
    """Number of questions and accuracy of each group; none where there are not two."""
    groups = {name: correct[names == name] for name in sorted(set(names.tolist()))}
    if len(groups) < 2:
        return {}
    return {name: {"n": len(c), "accuracy": stats.accuracy(c)._asdict()} for name, c in groups.items()}


def fine_tune_first(k: int, passed: dict[str, float]) -> str | None:
    """Advice where `GATE` is above the interval of pass@k over all k samples.

    What guessing would reach is not taken off: a right guess is paid as well, and a base that was below
    chance by it has learned (numbers/vision.md).
    """
    if passed["high"] >= GATE:
        return None
    few = f"pass@{k} is {percent(passed)}, below {100 * GATE:.0f} %"
    return f"{few}: reinforcement learning has too little to pay for; fine-tune first (`medrlvr sft`)"


def show(described: dict[str, dict[str, Any]]) -> str:
    """What `describe` says of each set, as tables with a line on how each figure is meant."""
    sets = {}
    for name, d in described.items():
        sets |= {name: d} | ({f"{name}, distinct": d["distinct"]} if "distinct" in d else {})
    header = ("set", "asked", "accuracy", "format", "entropy")
    rows = []
    for name, d in sets.items():
        entropy = f"{d['token_entropy']:.3f}" if "token_entropy" in d else "–"
        rows.append([name, f"{d['n']:,}", percent(d["accuracy"]), percent(d["format_ok"]), entropy])
    groups = [_group_table(name, group, d) for name, d in sets.items() for group in GROUPS if group in d]
    tables_shown = [tables.plain(header, rows), _samples(sets), _orders(sets), *groups, _letters(sets)]
    return "\n\n".join(filter(None, tables_shown))


def _samples(sets: dict[str, dict[str, Any]]) -> str:
    """pass@k and votes of the sets with several samples, and advice; "" if there are none."""
    sampled = {name: d for name, d in sets.items() if "pass_at_k" in d}
    rows = []
    for name, d in sampled.items():
        most = d["samples"]
        for k in sorted({1 << i for i in range(most.bit_length())} | {most}):
            beyond = d["pass_at_k_beyond_chance"][k]
            votes = [percent(d["majority"]), f"{d['answer_entropy']:.3f}"] if k == most else ["", ""]
            shares = [percent(d["pass_at_k"][k]), percent(beyond) if beyond else "–"]
            rows.append([name, str(k), *shares, *votes])
    columns = ("samples of", "k", "pass@k", "beyond chance", "maj@k", "answer entropy")
    every = {name: (d["samples"], d["pass_at_k"][d["samples"]]) for name, d in sampled.items()}
    lines = [f"{name}: {text}" for name, passed in every.items() if (text := fine_tune_first(*passed))]
    return "\n".join([tables.plain(columns, rows), SAMPLED, *lines]) if rows else ""


def _orders(sets: dict[str, dict[str, Any]]) -> str:
    """How often the same option was chosen in several orders; "" where none was shuffled."""
    rows = []
    for name, d in sets.items():
        if same := d.get("consistency"):
            rows.append([name, str(d["samples"]), percent(same["all"]), f"{100 * same['pairs']:.1f} %"])
    columns = ("options shuffled", "orders", "same option in all", "same option in two")
    return tables.plain(columns, rows) if rows else ""


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
    """Of each letter, how often it was answered and how often it is the key; "" without letters."""
    bias = {name: d["letters"] for name, d in sets.items() if "letters" in d}
    letters = sorted({letter for b in bias.values() for letter in b["letters"]})
    rows = []
    for name, b in bias.items():
        shares = [b["letters"].get(letter) for letter in letters]
        cells = ["" if s is None else f"{100 * s['answered']:.0f}/{100 * s['key']:.0f}" for s in shares]
        rows.append([name, *cells, f"{b['p']:.1g}"])
    return tables.plain(("% answered/key", *letters, "p (χ²)"), rows) if rows else ""


def remarks(name: str, counts: dict[str, Any]) -> list[str]:
    """What the counts of `evaluate.summarise` say beside accuracy: questions not asked, answers cut off."""
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


def percent(x: dict[str, float] | float) -> str:
    """A share, or a difference of two, with its interval if it has one."""
    if not isinstance(x, dict):
        return f"{100 * x:.1f} %"
    value, low, high = (f"{100 * x[k]:.1f}" for k in ("value", "low", "high"))
    return f"{value} % ({low}{' to ' if x['low'] < 0 else '–'}{high})"
