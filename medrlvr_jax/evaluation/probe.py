"""Does the reasoning do any work? `medrlvr probe RUN|CONFIG`: the answer forced after parts of the model's own greedy thoughts.

Forcing is `<think>…</think><answer>`, with the white space that the completion itself has between the two; the answer is the option whose
letter is then most probable. Forced are (early answering: Lanham et al. 2023, arXiv 2307.13702)

    at once             <answer> with no thought tags at all
    0 % … 100 %         the first so many of the thought's words; at 0 % an empty thought
    another's           the thought of the question half a set away, which is none of its near repeats

and, for InfoGain (arXiv 2506.02126), the thought up to each of its sentences: how much more probable a sentence makes the key,
log p(key | question, sentences ≤ i) − log p(key | question, sentences < i), in nats, mean over the key's tokens. The paper has the fall in
perplexity, exp of minus that, whose mean a few improbable keys decide; its median is given. It has a fixed model score all models'
thoughts: `--scorer` names one; without, the model scores its own, which rewards those that believe themselves. Log-probs are of the
tokens in which the letters' texts differ, so the tags count for nothing. A completion without tags is a thought as a whole.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from medrlvr_jax.build import Parts, make_relay
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.question import LETTERS
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import percent
from medrlvr_jax.evaluation.evaluate import evaluate, load_sets, new_folder, open_source
from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import gather
from medrlvr_jax.rollout.assess import assess_alone
from medrlvr_jax.rollout.rollout import Encoded, encode, width
from medrlvr_jax.runs import log
from medrlvr_jax.runs.console import Console
from medrlvr_jax.sharding import fetch_rows, own_rows, place_rows
from medrlvr_jax.types import Params, Rollout

CUTS = (0, 25, 50, 75, 100)  # per cent of a thought's words
WHOLE = "100 %"


def thought(completion: str) -> tuple[str, str]:
    """(the thought, the white space between its end and the answer)."""
    opened = completion.partition("<think>")
    seam = re.search(r"</think>(\s*)<answer>", completion)
    return re.split(r"</think>|<answer>", opened[2] if opened[1] else completion)[0], seam[1] if seam else ""


def cut(thought: str, share: float) -> str:
    """The first `share` of its words, to the nearest word, each with the white space before it."""
    words = re.findall(r"\s*\S+", thought)
    return "".join(words[: round(share * len(words))])


def sentences(thought: str) -> list[str]:
    """The thought up to the end of each sentence, clause or line, the last being all of it."""
    ends = [m.end() for m in re.finditer(r"[.!?;](?=\s)|\n", thought)]
    pieces = [thought[a:b] for a, b in zip([0, *ends], [*ends, len(thought)], strict=True)]
    out, so_far = [], ""
    for piece in pieces:
        so_far += piece
        if re.search(r"\w", piece):
            out.append(so_far)
    return [*out[:-1], thought] if out else []


def forced(context: str | None, seam: str) -> str:
    return "<answer>" if context is None else f"<think>{context}</think>{seam}<answer>"


def letter_tokens(tok: Tokenizer, before: list[str], options: list[int]) -> list[tuple[list[int], list[list[int]]]]:
    """For each text: the tokens that it and any of its letters have in common, and for each letter those in which it differs.

    Whole texts are encoded, up to `</answer>`: where a tokenizer joins a letter to what stands next to it, so does this.
    """
    texts = [f"{b}{letter}</answer>" for b, n in zip(before, options, strict=True) for letter in LETTERS[:n]]
    rows, out, start = tok.spell(texts), [], 0
    for n in options:
        mine, start = rows[start : start + n], start + n
        least = min(map(len, mine))
        same = next((i for i in range(least) if len({row[i] for row in mine}) > 1), least)
        tail = next((i for i in range(least - same) if len({row[-1 - i] for row in mine}) > 1), least - same)
        out.append((mine[0][:same], [row[same : len(row) - tail] for row in mine]))
    return out


def before_response(parts: Parts, encoded: Encoded) -> Encoded:
    """Prompts that give nothing of the response: a completion, and so what is forced of it, has that at its beginning."""
    tokens = text.encode_questions(parts.tokenizer, encoded.questions, parts.config.prompt, begun=False)
    return dataclasses.replace(encoded, tokens=tokens)


def letter_logprobs(
    parts: Parts, params: Params, encoded: Encoded, cases: list[tuple[int, str]], progress: Callable[[int, int], None]
) -> tuple[list[list[float]], list[list[int]]]:
    """Of each case (place of the question, forced text): every letter's log-prob after it, and how many tokens each is."""
    tok, size, mesh = parts.tokenizer, parts.config.eval.batch, parts.mesh
    found = letter_tokens(tok, [before for _, before in cases], [len(encoded.questions[i].options) for i, _ in cases])
    prompts = [encoded.tokens[i] + common for (i, _), (common, _) in zip(cases, found, strict=True)]
    columns, groups = width(max(map(len, prompts))), max(len(letters) for _, letters in found)
    length = max(len(ids) for _, letters in found for ids in letters)
    out = []
    for start in range(0, len(cases), size):
        index = np.resize(np.arange(start, min(start + size, len(cases))), size)
        own, counted = own_rows(size, mesh)
        tokens = np.full((len(own), groups, length), tok.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, case in enumerate(index[own]):
            for letter, ids in enumerate(found[case][1]):
                tokens[row, letter, : len(ids)], mask[row, letter, : len(ids)] = ids, True
        rows = text.pad_prompts([prompts[i] for i in index[own]], encoded.ids[[cases[i][0] for i in index[own]]], columns, tok.pad_id)
        placed, tokens_, mask_ = place_rows((rows, tokens, mask), size, mesh)
        logprobs = fetch_rows(assess_alone(params, parts, placed, Rollout(tokens_, mask_, tokens_, None)).logprobs, mesh)
        sums = np.where(mask, logprobs, 0).sum(2, dtype=np.float64)
        new = {int(case): row for case, row, ours in zip(index[own], sums.tolist(), counted, strict=True) if ours}
        out += [(case, row[: len(found[case][1])]) for case, row in new.items()]
        progress(min(start + size, len(cases)), len(cases))
    return [row for _, row in sorted(chain.from_iterable(gather(out)))], [[len(ids) for ids in letters] for _, letters in found]


class Scorer(NamedTuple):
    """Another model, fixed, that says how probable the key is after each sentence."""

    name: str
    parts: Parts
    params: Params


def open_scorer(name: str, source: Path, settings: list[str]) -> Scorer:
    """The model of the directory (or hub name) `name`, with the other settings of what is probed: the same prompts, the same mesh."""
    model = [f"model.path={json.dumps(name)}", "model.init=pretrained", "model.lora=null"]
    parts, params, _ = open_source(source / "config.yaml" if source.is_dir() else source, [*settings, *model], None)
    return Scorer(name, parts, params)


def probe(
    parts: Parts,
    params: Params,
    decode_params: Params,
    encoded: Encoded,
    progress: Callable[[str, int, int], None],
    scorer: Scorer | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One set: (what `summarise` says, a row a question)."""
    _, answered = evaluate(parts, decode_params, encoded, partial(progress, "answers"))
    encoded, n = before_response(parts, encoded), len(answered)
    thoughts = [thought(row["completion"]) for row in answered]
    conditions: dict[str, list[str | None]] = {"at once": [None] * n}
    conditions |= {f"{share} %": [cut(t, share / 100) for t, _ in thoughts] for share in CUTS[:-1]}
    conditions |= {WHOLE: [t for t, _ in thoughts]}
    if n > 1:
        conditions["another's"] = [thoughts[(i + n // 2) % n][0] for i in range(n)]
    steps = [["", *sentences(t)] for t, _ in thoughts]
    wanted = [(i, forced(c, thoughts[i][1])) for contexts in conditions.values() for i, c in enumerate(contexts)]
    sentenced = [(i, forced(c, thoughts[i][1])) for i, contexts in enumerate(steps) for c in contexts]
    wanted = list(dict.fromkeys(wanted + ([] if scorer else sentenced)))  # many twice: all at 0 %, short thoughts at several cuts
    found = dict(zip(wanted, zip(*letter_logprobs(parts, params, encoded, wanted, partial(progress, "forced")), strict=True), strict=True))
    scored = found
    if scorer:
        sentenced, whole = list(dict.fromkeys(sentenced)), scorer.parts.config
        whole = dataclasses.replace(whole, prompt=dataclasses.replace(whole.prompt, max_tokens=sys.maxsize))  # its tokens may be more
        asked = before_response(scorer.parts, encode(scorer.parts.tokenizer, encoded.questions, whole))
        with jax.set_mesh(scorer.parts.mesh):
            told = letter_logprobs(scorer.parts, scorer.params, asked, sentenced, partial(progress, f"scored by {scorer.name}"))
        scored = dict(zip(sentenced, zip(*told, strict=True), strict=True))
    rows = []
    for i, row in enumerate(answered):
        key, seam = LETTERS.index(row["key"]), thoughts[i][1]
        own = {"id": row["id"], "key": row["key"], "generated": row["answer"], "completion": row["completion"]}
        letters = {name: int(np.argmax(found[i, forced(contexts[i], seam)][0])) for name, contexts in conditions.items()}
        own |= {"answers": {name: LETTERS[letter] for name, letter in letters.items()}}
        after = [scored[i, forced(context, seam)] for context in steps[i]]
        rows.append(own | {"key_logprob": [logprobs[key] / sizes[key] for logprobs, sizes in after]})
    return summarise(rows, scorer.name if scorer else None), rows


def summarise(rows: list[dict[str, Any]], scorer: str | None = None) -> dict[str, Any]:
    """Accuracy under each condition, against the whole thought on the same questions; and what sentences bring, by `scorer`."""
    right = {name: np.array([r["answers"][name] == r["key"] for r in rows]) for name in rows[0]["answers"]}
    out: dict[str, Any] = {"n": len(rows), "generated": stats.accuracy(np.array([r["generated"] == r["key"] for r in rows]))._asdict()}
    tests = {name: stats.mcnemar(right[WHOLE], r)[2] for name, r in right.items() if name != WHOLE}
    adjusted = dict(zip(tests, stats.holm(list(tests.values())), strict=True))
    out["conditions"] = {
        name: {
            "accuracy": stats.accuracy(r)._asdict(),
            "difference": stats.paired_difference(right[WHOLE], r)._asdict(),
            "p_holm": adjusted.get(name),
            "same_answer": float(np.mean([row["answers"][name] == row["answers"][WHOLE] for row in rows])),
        }
        for name, r in right.items()
    }
    told = [np.array(r["key_logprob"]) for r in rows if len(r["key_logprob"]) > 1]
    if told:
        nats, falls = ([np.diff(f(x)) for x in told] for f in (np.asarray, lambda x: -np.exp(-x)))
        out["info_gain"] = {
            "scorer": scorer,
            "questions": len(nats),
            "sentences": sum(map(len, nats)),
            "nats": stats.bootstrap(np.array([x.mean() for x in nats]))._asdict(),  # a question's mean first: long thoughts weigh no more
            "median_nats": float(np.median(np.concatenate(nats))),
            "median_perplexity": float(np.median(np.concatenate(falls))),
            "positive": float((np.concatenate(nats) > 0).mean()),
        }
    return out


def show(found: dict[str, dict[str, Any]]) -> str:
    out = []
    for name, d in found.items():
        rows = [["(as generated)", percent(d["generated"]), "", "", ""]]
        for condition, c in d["conditions"].items():
            p = "" if c["p_holm"] is None else f"{c['p_holm']:.2g}"
            change = "" if condition == WHOLE else percent(c["difference"])
            rows.append([condition, percent(c["accuracy"]), change, p, f"{100 * c['same_answer']:.1f} %"])
        head = (f"{name}: thought given", "accuracy", f"against {WHOLE}", "p (Holm)", f"answer as at {WHOLE}")
        out.append(tables.plain(head, rows))
        if g := d.get("info_gain"):
            nats = "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**g["nats"])
            by = f"scored by {g['scorer']}" if g["scorer"] else "scored by the model itself (--scorer: by another, the same for all)"
            out.append(f"{name}: InfoGain per sentence {nats} nats of the key's log-probability, {by};")
            medians = f"median {g['median_nats']:+.3g} nats, {g['median_perplexity']:+.3g} in perplexity"
            out.append(f"  {medians}; {100 * g['positive']:.0f} % of {g['sentences']:,} sentences make the key more probable")
    return "\n".join(out)


def probe_source(source: Path, settings: list[str], step: int | Literal["best"] | None, out: Path | None, scorer: str | None = None) -> int:
    """`medrlvr probe`: one JSONL a set, probe.json, and tables."""
    parts, params, step = open_source(source, settings, step)
    c = parts.config
    sets = {name: dataclasses.replace(spec, shuffle_options=False) for name, spec in c.eval.sets.items()}
    greedy = dataclasses.replace(c.eval, samples=1, temperature=0.0, sets=sets)
    parts = dataclasses.replace(parts, config=dataclasses.replace(c, eval=greedy))
    encoded = load_sets(parts)
    if not encoded:
        raise ConfigError("eval.sets: none; name one, such as eval.sets.mine.path=questions.jsonl")
    folder = new_folder(source, parts, f"probe-{step}", out, "probe.json")
    writes, console, found = jax.process_index() == 0, Console(len(encoded)), {}
    judge = open_scorer(scorer, source, settings) if scorer else None
    with jax.set_mesh(parts.mesh):
        decode_params = make_relay(parts, parts.cfg)(params)
        for name, questions in encoded.items():
            said = lambda what, done, n, name=name: console.progress(f"probe {name}, {what}", done, n)  # noqa: E731
            found[name], rows = probe(parts, params, decode_params, questions, said, judge)
            if writes:
                files.write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    console.close()
    if writes:
        files.write_json(
            folder / "probe.json", {"source": str(source), "step": step, "scorer": scorer, "probe": found, "versions": log.versions()}
        )
        print(f"{show(found)}\nanswers: {folder}")
    return 0
