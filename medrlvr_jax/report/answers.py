"""The answers of evaluations for the page: which questions each answered right, and the answers to some.

The page shows two evaluations side by side, and one question over time. A training run writes its answers
into answers/, and `medrlvr eval` into its own folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medrlvr_jax.evaluation.answers import newest_evaluation
from medrlvr_jax.host.files import read_json, read_jsonl

SIZE = 1_200_000  # characters of all prompts, answers and images on a page, approximately
LENGTH = 2000  # characters of one answer
EVALUATIONS = 16  # on a page, approximately; at least the first and the last of each run
Rows = list[dict[str, Any]]


def folders(run: Path, most: int) -> dict[int, Path]:
    """Return the folders of at most `most` evaluations of a run by step, evenly chosen.

    If the run has none of its own, or is itself an evaluation, it is the newest of `medrlvr eval`.
    """
    steps = {int(folder.name): folder for folder in run.glob("answers/*")}
    if steps:
        chosen = np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)
        return {step: steps[step] for step in np.array(sorted(steps))[chosen].tolist()}
    newest = newest_evaluation(run)
    return {read_json(newest / "eval.json").get("step", 0): newest} if newest else {}


def answers(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Return `{set: {"questions": [{id, text, key, images}], "evaluations": [{run, step, right, texts}]}}`.

    `right` has a character for each question: 1, 0, or - if it was not asked. `questions` are those whose
    answers fit into `SIZE`; questions on which evaluations differ come first. `texts` are their answers, null
    if a question was not asked. `runs` are folders by name.
    """
    most = max(2, EVALUATIONS // max(1, len(runs)))
    rows: dict[str, dict[tuple[str, int], Rows]] = {}
    for name, folder in runs.items():
        for step, evaluation in folders(folder, most).items():
            for file in sorted(evaluation.glob("*.jsonl")):
                first = [row for row in read_jsonl(file) if row.get("sample", 0) == 0]
                rows.setdefault(file.stem, {})[name, step] = first
    room = SIZE // max(1, len(rows))
    return {name: _of_set(evaluations, room) for name, evaluations in rows.items()}


def _of_set(evaluations: Mapping[tuple[str, int], Rows], room: int) -> dict[str, Any]:
    by_key = [{(row["id"], row.get("question_hash")): row for row in rows} for rows in evaluations.values()]
    every = {key: row for rows in by_key for key, row in rows.items()}
    images = {key: row["images"] for rows in by_key for key, row in rows.items() if "images" in row}
    mark = lambda row: "-" if row is None else "01"[bool(row["correct"])]
    right = {key: "".join(mark(rows.get(key)) for rows in by_key) for key in every}
    order = sorted(every, key=lambda key: not {"0", "1"} <= set(right[key]))  # differing ones come first
    texts = [every[key].get("question", "") for key in order]  # answers of older versions have none
    sizes = [
        len(text) + sum(len(r[k]["completion"]) for r in by_key if k in r) + sum(map(len, images.get(k, ())))
        for k, text in zip(order, texts, strict=True)
    ]
    shown = int(np.searchsorted(np.cumsum(sizes), room, side="right"))
    about = [
        {"id": every[k]["id"], "text": t, "key": every[k]["key"], "images": images.get(k, [])}
        for k, t in zip(order, texts, strict=True)
    ]
    return {
        "questions": about[:shown],
        "evaluations": [
            {
                "run": run,
                "step": step,
                "right": "".join(right[key][number] for key in order),
                "texts": [rows[key]["completion"][:LENGTH] if key in rows else None for key in order[:shown]],
            }
            for number, ((run, step), rows) in enumerate(zip(evaluations, by_key, strict=True))
        ],
    }
