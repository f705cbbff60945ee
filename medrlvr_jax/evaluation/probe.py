"""Does the reasoning change the answers? `medrlvr probe RUN|CONFIG` forces answers after parts of thoughts.

The model is given `<think>…</think><answer>`, with the white space between the two tags of its own
completion. Its forced answer is the option whose letter is most probable. It is forced after these thoughts
(early answering: Lanham et al. 2023, arXiv 2307.13702):

    at once             no thought and no thought tags
    0 % … 100 %         this share of the words of its own thought; 0 % is an empty thought
    another's           the thought on the question half a set away, which is hardly a near repeat

InfoGain (arXiv 2506.02126) is how much more probable a sentence makes the key: log p(key | question,
sentences ≤ i) − log p(key | question, sentences < i), in nats, mean over the key's tokens. The paper reports
the fall in perplexity, whose mean depends on a few improbable keys; here its median is reported. As in the
paper, one fixed model can score the thoughts of all models: `--scorer` names it. Otherwise the model scores
its own thoughts, which favours overconfident models. Log-probs are of the tokens in which the letters' texts
differ, so the tags do not count. A completion without tags is treated as a thought.
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
from medrlvr_jax.evaluation.evaluate import evaluate, new_folder, open_policy, required_sets
from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import gather_rows
from medrlvr_jax.model_rewards.endings import thought_prefixes
from medrlvr_jax.rollout.assess import assess_alone
from medrlvr_jax.rollout.rollout import Encoded, before_response, encode, place_prompts, width
from medrlvr_jax.rollout.sync import make_weight_sync
from medrlvr_jax.runs import log
from medrlvr_jax.runs.checkpoint import Which
from medrlvr_jax.runs.console import Console, ShowProgress
from medrlvr_jax.sharding import fetch_rows, local_rows, place_rows
from medrlvr_jax.types import Params, Rollout

CUTS = (0, 25, 50, 75, 100)  # per cent of a thought's words
WHOLE = "100 %"
Case = tuple[int, str]  # the index of a question, and the beginning of its response up to <answer>
Scores = tuple[list[float], list[int]]  # of one case: each letter's log-prob, and its number of tokens


def thought(completion: str) -> tuple[str, str]:
    """Return the thought, and the white space between its end and the answer."""
    opened = completion.partition("<think>")
    seam = re.search(r"</think>(\s*)<answer>", completion)
    return re.split(r"</think>|<answer>", opened[2] if opened[1] else completion)[0], seam[1] if seam else ""


def cut(thought: str, share: float) -> str:
    """Return the first `share` of the thought's words, rounded, each with the white space before it."""
    words = re.findall(r"\s*\S+", thought)
    return "".join(words[: round(share * len(words))])


def forced(context: str | None, seam: str) -> str:
    return "<answer>" if context is None else f"<think>{context}</think>{seam}<answer>"


def letter_tokens(
    tok: Tokenizer, before: list[str], options: list[int]
) -> list[tuple[list[int], list[list[int]]]]:
    """Return for each text in `before` the tokens that do not depend on the letter after it, and by letter
    those that do. The text has `options` letters.

    Texts are encoded with the letter and `</answer>`, since a tokenizer may join a letter to its neighbours.
    """
    texts = [f"{b}{letter}</answer>" for b, n in zip(before, options, strict=True) for letter in LETTERS[:n]]
    encoded, out = iter(tok.encode_untrusted(texts)), []
    for n in options:
        rows = list(islice(encoded, n))
        shortest = min(map(len, rows))
        same = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
        rest = shortest - same
        tail = next((i for i in range(rest) if len({row[-1 - i] for row in rows}) > 1), rest)
        out.append((rows[0][:same], [row[same : len(row) - tail] for row in rows]))
    return out


def letter_logprobs(
    parts: Parts,
    params: Params,
    encoded: Encoded,
    cases: list[Case],
    progress: Progress,
) -> dict[Case, Scores]:
    """Return the scores of each case on all processes, which must call it together.

    Equal cases, such as all those at 0 %, are scored once.
    """
    cases = list(dict.fromkeys(cases))
    tok, size, mesh = parts.tokenizer, parts.config.eval.batch, parts.mesh
    options = [len(encoded.questions[i].options) for i, _ in cases]
    split = letter_tokens(tok, [before for _, before in cases], options)
    index = [i for i, _ in cases]
    prompts = [encoded.tokens[i] + common for i, (common, _) in zip(index, split, strict=True)]
    forced_prompts = dataclasses.replace(
        encoded,
        questions=[encoded.questions[i] for i in index],
        tokens=prompts,
        ids=encoded.ids[index],
        width=width(max(map(len, prompts))),
        images=encoded.images and encoded.images.subset(index),
    )
    groups, length = max(options), max(len(ids) for _, letters in split for ids in letters)
    out: list[tuple[int, list[float]]] = []
    for start in range(0, len(cases), size):
        stop = min(start + size, len(cases))
        batch = np.resize(np.arange(start, stop), size)
        places, counted = local_rows(size, mesh)
        local = batch[places]
        tokens = np.full((len(local), groups, length), tok.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, case in enumerate(local):
            for letter, ids in enumerate(split[case][1]):
                tokens[row, letter, : len(ids)], mask[row, letter, : len(ids)] = ids, True
        tokens_, mask_ = place_rows((tokens, mask), size, mesh)
        placed = place_prompts(params, parts, forced_prompts, batch)
        scored = assess_alone(params, parts, placed, Rollout(tokens_, mask_, tokens_, None))
        sums = np.where(mask, fetch_rows(scored.logprobs, mesh), 0).sum(2, dtype=np.float64)
        # A short last batch repeats cases; the dict has each once.
        new = {int(case): row for case, row in zip(local[counted], sums[counted].tolist(), strict=True)}
        out += [(case, row[: options[case]]) for case, row in new.items()]
        progress(stop, len(cases))
    sizes = [[len(ids) for ids in letters] for _, letters in split]
    return dict(zip(cases, zip(gather_rows(out), sizes, strict=True), strict=True))


class Scorer(NamedTuple):
    """Another model, which scores the sentences of the thoughts for InfoGain."""

    name: str  # a directory or hub name
    parts: Parts
    params: Params


def open_scorer(name: str, source: Path, settings: list[str]) -> Scorer:
    """Load the scorer `name`. All its settings except the model's are those of the probed model."""
    plain_model = ["model.init=pretrained", "model.lora=null", "model.vision=freeze"]
    model = [f"model.path={json.dumps(name)}", *plain_model]
    parts, params, _ = open_policy(find_config(source), [*settings, *model], None, "probe")
    return Scorer(name, parts, params)


def scorer_questions(scorer: Scorer, encoded: Encoded) -> Encoded:
    """Return the questions as the scorer's prompts. Raises `ConfigError` if it cannot see their images."""
    parts, unlimited = scorer.parts, sys.maxsize  # so that no question is dropped
    prompt = dataclasses.replace(parts.config.prompt, max_tokens=unlimited)
    config = dataclasses.replace(parts.config, prompt=prompt)
    return before_response(parts, encode(parts.tokenizer, encoded.questions, config, vision=parts.cfg.vision))


def contexts_of(thoughts: list[str]) -> dict[str, list[str | None]]:
    """Return the thoughts of each condition, one for each question; None stands for no thought tags."""
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
    progress: ShowProgress,
    scorer: Scorer | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Probe one set. Returns the figures (`summarise`) and a row for each question.

    Raises `ConfigError` if one letter does not answer a question.
    """
    if question := next((q for q in encoded.questions if q.value is not None), None):
        problem = "probe forces one letter, which does not answer this question"
        raise ConfigError(f"question {question.id}: {problem}; take its set out of eval.sets")
    of_scorer = scorer_questions(scorer, encoded) if scorer else None
    _, answered = evaluate(parts, decode_params, encoded, partial(progress, "answers"))
    encoded = before_response(parts, encoded)
    thoughts, seams = zip(*(thought(row["completion"]) for row in answered), strict=True)
    case = lambda i, context: (i, forced(context, seams[i]))
    contexts = contexts_of(list(thoughts))
    conditions = {name: [case(i, c) for i, c in enumerate(row)] for name, row in contexts.items()}
    steps = [[case(i, c) for c in ("", *thought_prefixes(t))] for i, t in enumerate(thoughts)]
    cases, step_cases = [*chain(*conditions.values())], [*chain(*steps)]
    report = partial(progress, "forced")
    if scorer and of_scorer:
        scores = letter_logprobs(parts, params, encoded, cases, report)
        report = partial(progress, f"scored by {scorer.name}")
        with jax.set_mesh(scorer.parts.mesh):
            step_scores = letter_logprobs(scorer.parts, scorer.params, of_scorer, step_cases, report)
    else:
        scores = step_scores = letter_logprobs(parts, params, encoded, cases + step_cases, report)
    rows = []
    for i, row in enumerate(answered):
        key = LETTERS.index(row["key"])
        best = {name: LETTERS[np.argmax(scores[cases[i]][0])] for name, cases in conditions.items()}
        logprobs = [sums[key] / sizes[key] for sums, sizes in map(step_scores.__getitem__, steps[i])]
        about = {"id": row["id"], "key": row["key"], "generated": row["answer"]}
        about |= {"completion": row["completion"], "answers": best}
        rows.append(about | {"key_logprob": logprobs})
    return summarise(rows, scorer.name if scorer else None), rows


def summarise(rows: list[dict[str, Any]], scorer: str | None = None) -> dict[str, Any]:
    """Return the accuracy under each condition, its difference to the whole thought, and InfoGain.

    `scorer` names the model that scored the sentences; None is the model itself.
    """
    right = {name: np.array([r["answers"][name] == r["key"] for r in rows]) for name in rows[0]["answers"]}
    generated = np.array([r["generated"] == r["key"] for r in rows])
    tests = {name: stats.mcnemar(right[WHOLE], x)[2] for name, x in right.items() if name != WHOLE}
    adjusted = dict(zip(tests, stats.holm(list(tests.values())), strict=True))
    conditions = {
        name: {
            "accuracy": stats.accuracy(x),
            "difference": stats.paired_difference(right[WHOLE], x),
            "p_holm": adjusted.get(name),
            "same_answer": float(np.mean([row["answers"][name] == row["answers"][WHOLE] for row in rows])),
        }
        for name, x in right.items()
    }
    out: dict[str, Any] = {"n": len(rows), "generated": stats.accuracy(generated), "conditions": conditions}
    logprobs = [np.array(r["key_logprob"]) for r in rows if len(r["key_logprob"]) > 1]
    if logprobs:
        nats, falls = [np.diff(x) for x in logprobs], [np.diff(-np.exp(-x)) for x in logprobs]
        # The mean of each question comes first, so that long thoughts have no larger weight.
        means = np.array([x.mean() for x in nats])
        out["info_gain"] = {
            "scorer": scorer,
            "questions": len(nats),
            "sentences": sum(map(len, nats)),
            "nats": stats.mean(means),
            "median_nats": float(np.median(np.concatenate(nats))),
            "median_perplexity": float(np.median(np.concatenate(falls))),
            "positive": float((np.concatenate(nats) > 0).mean()),
        }
    return out


def show(probed: dict[str, dict[str, Any]]) -> str:
    """Return a table of each set, and its InfoGain."""
    out = []
    for name, d in probed.items():
        rows = [["(as generated)", percent(d["generated"]), "", "", ""]]
        for condition, c in d["conditions"].items():
            p = "" if c["p_holm"] is None else f"{c['p_holm']:.2g}"
            change = "" if condition == WHOLE else percent(c["difference"])
            rows.append([condition, percent(c["accuracy"]), change, p, percent(c["same_answer"])])
        head = (f"{name}: thought given", "accuracy", f"against {WHOLE}", "p (Holm)", f"answer as at {WHOLE}")
        out.append(tables.plain(head, rows))
        if g := d.get("info_gain"):
            nats = "{:+.3f} ({:+.3f} to {:+.3f})".format(*g["nats"])
            by = g["scorer"] or "the model itself (--scorer names another model)"
            gain = f"InfoGain per sentence {nats} nats of the key's log-probability"
            out.append(f"{name}: {gain}, scored by {by};")
            medians = f"median {g['median_nats']:+.3g} nats, {g['median_perplexity']:+.3g} in perplexity"
            more = f"{100 * g['positive']:.0f} % of {g['sentences']:,} sentences make the key more probable"
            out.append(f"  {medians}; {more}")
    return "\n".join(out)


def probe_source(
    source: Path, settings: list[str], step: Which, out: Path | None, scorer: str | None = None
) -> int:
    """Run `medrlvr probe`: write a JSONL for each set and probe.json, and print tables."""
    parts, params, step = open_policy(source, settings, step, "probe")
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
