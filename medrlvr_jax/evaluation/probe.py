"""Does the reasoning matter? `medrlvr probe RUN|CONFIG`: the model must answer after parts of its thoughts.

It is given `<think>…</think><answer>`, with the white space that the completion has between the two; its
answer is then the option whose letter is most probable. The thoughts are (early answering: Lanham et al.
2023, arXiv 2307.13702)

    at once             none, and no thought tags
    0 % … 100 %         this share of the words of its thought; at 0 % an empty thought
    another's           the thought of the question half a set away, so not of a near repeat

and, for InfoGain (arXiv 2506.02126), the thought up to each of its sentences: how much more probable a
sentence makes the key, log p(key | question, sentences ≤ i) − log p(key | question, sentences < i), in nats,
mean over the key's tokens. The paper has the fall in perplexity, whose mean depends on a few improbable keys;
its median is given. It has a fixed model score all models' thoughts: `--scorer` names one. Without, the model
scores its own thoughts, which favours models that believe themselves. Log-probs are of the tokens in which
the letters' texts differ, so the tags do not count. A completion without tags is taken as a thought.
"""

import dataclasses
import json
import re
import sys
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from medrlvr_jax.build import Parts
from medrlvr_jax.config.load import find_config
from medrlvr_jax.data.question import LETTERS
from medrlvr_jax.data.tokenizer import Progress, Tokenizer
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import percent
from medrlvr_jax.evaluation.evaluate import evaluate, new_folder, open_source, required_sets
from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import gather_rows
from medrlvr_jax.model_rewards.joins import sentences
from medrlvr_jax.rollout.assess import assess_alone
from medrlvr_jax.rollout.rollout import Encoded, before_response, encode, place_prompts, width
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs import log
from medrlvr_jax.runs.checkpoint import Which
from medrlvr_jax.runs.console import Console, Show
from medrlvr_jax.sharding import fetch_rows, own_rows, place_rows
from medrlvr_jax.types import Params, Rollout

CUTS = (0, 25, 50, 75, 100)  # per cent of a thought's words
WHOLE = "100 %"
Case = tuple[int, str]  # the index of a question, and the text that its response begins with


def thought(completion: str) -> tuple[str, str]:
    """(the thought, the white space between its end and the answer)."""
    opened = completion.partition("<think>")
    seam = re.search(r"</think>(\s*)<answer>", completion)
    return re.split(r"</think>|<answer>", opened[2] if opened[1] else completion)[0], seam[1] if seam else ""


def cut(thought: str, share: float) -> str:
    """The first `share` of its words, to the nearest word, each with the white space before it."""
    words = re.findall(r"\s*\S+", thought)
    return "".join(words[: round(share * len(words))])


def forced(context: str | None, seam: str) -> str:
    return "<answer>" if context is None else f"<think>{context}</think>{seam}<answer>"


def letter_tokens(
    tok: Tokenizer, before: list[str], options: list[int]
) -> list[tuple[list[int], list[list[int]]]]:
    """For each text: the tokens that are the same whichever letter follows, and those that differ, by letter.

    Texts are encoded up to `</answer>`, since a tokenizer may join a letter to its neighbours.
    """
    texts = [f"{b}{letter}</answer>" for b, n in zip(before, options, strict=True) for letter in LETTERS[:n]]
    encoded, out = iter(tok.spell(texts)), []
    for n in options:
        rows = list(islice(encoded, n))
        least = min(map(len, rows))
        same = next((i for i in range(least) if len({row[i] for row in rows}) > 1), least)
        tail = next((i for i in range(least - same) if len({row[-1 - i] for row in rows}) > 1), least - same)
        out.append((rows[0][:same], [row[same : len(row) - tail] for row in rows]))
    return out


def letter_logprobs(
    parts: Parts,
    params: Params,
    encoded: Encoded,
    cases: list[Case],
    progress: Progress,
) -> list[tuple[list[float], list[int]]]:
    """For each case: each letter's log-prob and number of tokens."""
    tok, size, mesh = parts.tokenizer, parts.config.eval.batch, parts.mesh
    options = [len(encoded.questions[i].options) for i, _ in cases]
    split = letter_tokens(tok, [before for _, before in cases], options)
    which = [i for i, _ in cases]
    prompts = [encoded.tokens[i] + common for i, (common, _) in zip(which, split, strict=True)]
    asked = dataclasses.replace(
        encoded,
        questions=[encoded.questions[i] for i in which],
        tokens=prompts,
        ids=encoded.ids[which],
        width=width(max(map(len, prompts))),
        images=encoded.images and encoded.images.taking(which),
    )
    groups, length = max(options), max(len(ids) for _, letters in split for ids in letters)
    out: list[tuple[int, list[float]]] = []
    for start in range(0, len(cases), size):
        stop = min(start + size, len(cases))
        batch = np.resize(np.arange(start, stop), size)
        places, counted = own_rows(size, mesh)
        mine = batch[places]
        tokens = np.full((len(mine), groups, length), tok.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, case in enumerate(mine):
            for letter, ids in enumerate(split[case][1]):
                tokens[row, letter, : len(ids)], mask[row, letter, : len(ids)] = ids, True
        tokens_, mask_ = place_rows((tokens, mask), size, mesh)
        placed = place_prompts(params, parts, asked, batch)
        scored = assess_alone(params, parts, placed, Rollout(tokens_, mask_, tokens_, None))
        sums = np.where(mask, fetch_rows(scored.logprobs, mesh), 0).sum(2, dtype=np.float64)
        new = {int(case): row for case, row in zip(mine[counted], sums[counted].tolist(), strict=True)}
        out += [(case, row[: options[case]]) for case, row in new.items()]
        progress(stop, len(cases))
    sizes = [[len(ids) for ids in letters] for _, letters in split]
    return list(zip(gather_rows(out), sizes, strict=True))


class Scorer(NamedTuple):
    """Another model, whose probability of the key after each sentence counts."""

    name: str  # a directory or hub name
    parts: Parts
    params: Params


def open_scorer(name: str, source: Path, settings: list[str]) -> Scorer:
    """Its settings, apart from the model, are the probed model's."""
    whole = ["model.init=pretrained", "model.lora=null", "model.vision=freeze"]
    model = [f"model.path={json.dumps(name)}", *whole]
    parts, params, _ = open_source(find_config(source), [*settings, *model], None, "probe")
    return Scorer(name, parts, params)


def contexts_of(thoughts: list[str]) -> dict[str, list[str | None]]:
    """Each condition's thoughts, one a question; None: no tags."""
    n, cuts = len(thoughts), [(f"{share} %", share / 100) for share in CUTS]
    out: dict[str, list[str | None]] = {"at once": [None] * n}
    out |= {name: [cut(t, share) if share < 1 else t for t in thoughts] for name, share in cuts}
    if n > 1:
        out["another's"] = [thoughts[(i + n // 2) % n] for i in range(n)]
    return out


def probe(
    parts: Parts,
    params: Params,
    decode_params: Params,
    encoded: Encoded,
    progress: Show,
    scorer: Scorer | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One set: what `summarise` returns, and a row a question."""
    if open_one := next((q for q in encoded.questions if q.value is not None), None):
        problem = "probe forces one letter, which does not answer this question"
        raise ConfigError(f"question {open_one.id}: {problem}; take its set out of eval.sets")
    of_scorer = scorer_questions(scorer, encoded) if scorer else encoded
    _, answered = evaluate(parts, decode_params, encoded, partial(progress, "answers"))
    encoded = before_response(parts, encoded)
    thoughts, seams = zip(*(thought(row["completion"]) for row in answered), strict=True)
    case = lambda i, context: (i, forced(context, seams[i]))
    contexts = contexts_of(list(thoughts))
    conditions = {name: [case(i, c) for i, c in enumerate(row)] for name, row in contexts.items()}
    steps = [[case(i, c) for c in ("", *sentences(t))] for i, t in enumerate(thoughts)]
    cases, of_steps = [*chain(*conditions.values())], [*chain(*steps)]
    report = partial(progress, "forced")
    scores = score_cases(parts, params, encoded, cases + ([] if scorer else of_steps), report)
    step_scores = score_by(scorer, of_scorer, of_steps, progress) if scorer else scores
    rows = []
    for i, row in enumerate(answered):
        key, after = LETTERS.index(row["key"]), [step_scores[step] for step in steps[i]]
        best = {name: LETTERS[np.argmax(scores[cases[i]][0])] for name, cases in conditions.items()}
        about = {"id": row["id"], "key": row["key"], "generated": row["answer"]}
        about |= {"completion": row["completion"], "answers": best}
        rows.append(about | {"key_logprob": [logprobs[key] / sizes[key] for logprobs, sizes in after]})
    return summarise(rows, scorer.name if scorer else None), rows


def score_cases(
    parts: Parts, params: Params, encoded: Encoded, cases: list[Case], progress: Progress
) -> dict[Case, tuple[list[float], list[int]]]:
    """`letter_logprobs` by case. Many cases are equal, such as all at 0 %."""
    cases = list(dict.fromkeys(cases))
    return dict(zip(cases, letter_logprobs(parts, params, encoded, cases, progress), strict=True))


def scorer_questions(scorer: Scorer, encoded: Encoded) -> Encoded:
    """The questions as another model reads them. Refuses images where it sees none."""
    parts, every_length = scorer.parts, sys.maxsize  # so that no question is dropped
    prompt = dataclasses.replace(parts.config.prompt, max_tokens=every_length)
    config = dataclasses.replace(parts.config, prompt=prompt)
    asked = encode(parts.tokenizer, encoded.questions, config, vision=parts.cfg.vision)
    return before_response(parts, asked)


def score_by(
    scorer: Scorer, encoded: Encoded, cases: list[Case], progress: Show
) -> dict[Case, tuple[list[float], list[int]]]:
    """`score_cases` by another model, of its own prompts."""
    with jax.set_mesh(scorer.parts.mesh):
        report = partial(progress, f"scored by {scorer.name}")
        return score_cases(scorer.parts, scorer.params, encoded, cases, report)


def summarise(rows: list[dict[str, Any]], scorer: str | None = None) -> dict[str, Any]:
    """Accuracy under each condition, against the full thought on the same questions; what sentences bring.

    `scorer` names the model that scored the sentences; None: the model itself.
    """
    right = {name: np.array([r["answers"][name] == r["key"] for r in rows]) for name in rows[0]["answers"]}
    generated = np.array([r["generated"] == r["key"] for r in rows])
    tests = {name: stats.mcnemar(right[WHOLE], x)[2] for name, x in right.items() if name != WHOLE}
    adjusted = dict(zip(tests, stats.holm(list(tests.values())), strict=True))
    conditions = {
        name: {
            "accuracy": stats.accuracy(x)._asdict(),
            "difference": stats.paired_difference(right[WHOLE], x)._asdict(),
            "p_holm": adjusted.get(name),
            "same_answer": float(np.mean([row["answers"][name] == row["answers"][WHOLE] for row in rows])),
        }
        for name, x in right.items()
    }
    out: dict[str, Any] = {"n": len(rows), "generated": stats.accuracy(generated)._asdict()}
    out["conditions"] = conditions
    logprobs = [np.array(r["key_logprob"]) for r in rows if len(r["key_logprob"]) > 1]
    if logprobs:
        nats, falls = [np.diff(x) for x in logprobs], [np.diff(-np.exp(-x)) for x in logprobs]
        means = np.array([x.mean() for x in nats])  # a question's mean first: long thoughts weigh no more
        out["info_gain"] = {
            "scorer": scorer,
            "questions": len(nats),
            "sentences": sum(map(len, nats)),
            "nats": stats.mean(means)._asdict(),
            "median_nats": float(np.median(np.concatenate(nats))),
            "median_perplexity": float(np.median(np.concatenate(falls))),
            "positive": float((np.concatenate(nats) > 0).mean()),
        }
    return out


def show(probed: dict[str, dict[str, Any]]) -> str:
    """A table a set, and its InfoGain."""
    out = []
    for name, d in probed.items():
        rows = [["(as generated)", percent(d["generated"]), "", "", ""]]
        for condition, c in d["conditions"].items():
            p = "" if c["p_holm"] is None else f"{c['p_holm']:.2g}"
            change = "" if condition == WHOLE else percent(c["difference"])
            rows.append([condition, percent(c["accuracy"]), change, p, f"{100 * c['same_answer']:.1f} %"])
        head = (f"{name}: thought given", "accuracy", f"against {WHOLE}", "p (Holm)", f"answer as at {WHOLE}")
        out.append(tables.plain(head, rows))
        if g := d.get("info_gain"):
            nats = "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**g["nats"])
            by = g["scorer"] or "the model itself (--scorer: by another, the same for all)"
            gain = f"InfoGain per sentence {nats} nats of the key's log-probability"
            out.append(f"{name}: {gain}, scored by {by};")
            medians = f"median {g['median_nats']:+.3g} nats, {g['median_perplexity']:+.3g} in perplexity"
            more = f"{100 * g['positive']:.0f} % of {g['sentences']:,} sentences make the key more probable"
            out.append(f"  {medians}; {more}")
    return "\n".join(out)


def probe_source(
    source: Path, settings: list[str], step: Which, out: Path | None, scorer: str | None = None
) -> int:
    """`medrlvr probe`: one JSONL a set, probe.json, and tables."""
    parts, params, step = open_source(source, settings, step, "probe")
    c = parts.config
    sets = {name: dataclasses.replace(spec, shuffle_options=False) for name, spec in c.eval.sets.items()}
    greedy = dataclasses.replace(c.eval, samples=1, temperature=0.0, sets=sets)
    parts = dataclasses.replace(parts, config=dataclasses.replace(c, eval=greedy))
    encoded = required_sets(parts)
    folder = new_folder(source, parts, f"probe-{step}", out, "probe.json")
    leads, console, probed = jax.process_index() == 0, Console(), {}
    judge = open_scorer(scorer, source, settings) if scorer else None
    with jax.set_mesh(parts.mesh):
        decode_params = make_weight_sync(parts, parts.cfg)(params)
        for name, questions in encoded.items():
            progress = lambda what, *done, name=name: console.progress(f"probe {name}, {what}", *done)
            probed[name], rows = probe(parts, params, decode_params, questions, progress, judge)
            if leads:
                files.write_text(folder / f"{name}.jsonl", files.jsonl(rows))
    console.close()
    if leads:
        tree = {"source": str(source), "step": step, "scorer": scorer, "probe": probed}
        files.write_json(folder / "probe.json", tree | {"versions": log.versions()})
        print(f"{show(probed)}\nanswers: {folder}")
    return 0
