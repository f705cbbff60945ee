"""The embedded world: its table is consistent, each question has one right answer, no case is in two sets, and
tokens are exact and few.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medrlvr_jax.config.schema import PromptConfig, RewardConfig
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.question import LETTERS, TAGS, Question
from medrlvr_jax.data.tokenizer import load_tokenizer
from medrlvr_jax.rewards import grade, score
from medrlvr_jax.rewards.penalties import LEAK
from medrlvr_jax.rewards.stages import stage
from medrlvr_jax.world import __main__ as world_cli
from medrlvr_jax.world import corpus as texts
from medrlvr_jax.world import knowledge, words, world
from medrlvr_jax.world import open as open_questions

SPLITS = tuple(world.SIZES)
# The tests read the table themselves, so that they are independent of knowledge.py.
TREE = yaml.safe_load((words.FOLDER / "knowledge.yaml").read_text("utf-8"))
CONDITIONS, DRUGS = TREE["conditions"], TREE["drugs"]
PINNED = {
    "train": "af7f2b6e411b",
    "in_distribution": "c0ce2525ea60",
    "out_of_distribution": "969cb1ed2da0",
    "corpus": "873164d00b04",
}
FINDINGS = {f for c in CONDITIONS.values() for f in c["typical"] + c["rare"]}


@cache
def asked(split: str) -> list[Question]:
    return world.questions(split)


@cache
def corpus() -> list:
    return texts.corpus(4000)


@cache
def pattern(names: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern for any of the names as whole words, longer names first (`strep antigen`, `antigen`)."""
    return re.compile(
        rf"(?<![\w-])(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})(?![\w-])"
    )


def mentioned(names, said: str) -> list[str]:
    return sorted(set(pattern(frozenset(names)).findall(said)))


def key_of(question: str) -> tuple[str, tuple[str, ...], str | None]:
    """Return the case of a question, found from its words and the table alone."""
    found = mentioned(FINDINGS, question)
    fits = [name for name, c in CONDITIONS.items() if set(found) <= {*c["typical"], *c["rare"]}]
    assert len(fits) == 1 and len(found) in (2, 3), (question, found, fits)
    histories = mentioned(TREE["histories"], question)
    assert len(histories) < 2, question
    return fits[0], tuple(found), histories[0] if histories else None


def stem(prompt: str) -> str:
    return prompt.split("\n")[0]


# ---- the table ----


def test_every_drug_is_known_and_no_alternative_is_barred():
    for name, c in CONDITIONS.items():
        assert len(c["typical"]) == 4 and len(c["rare"]) == 2 and c["unless"], name
        assert {c["first"], *c["unless"].values(), *c["also"]} <= DRUGS.keys(), name
        assert {*c["unless"], *c.get("skip", [])} <= set(TREE["histories"]), name
        for history, other in c["unless"].items():
            assert history in DRUGS[c["first"]].get("avoid", []), (name, history)
            assert history not in DRUGS[other].get("avoid", []) + DRUGS[other].get("care", []), (
                name,
                history,
                other,
            )
            assert history not in c.get("skip", []), (name, history)
    for name, d in DRUGS.items():
        assert {*d.get("avoid", []), *d.get("care", [])} <= set(TREE["histories"]), name
        assert not set(d.get("avoid", [])) & set(d.get("care", [])), name
    assert len(FINDINGS | CONDITIONS.keys() | DRUGS.keys()) == len(FINDINGS) + len(CONDITIONS) + len(DRUGS)
    assert len(CONDITIONS) == 40 and len(knowledge.table().conditions) == 40


# ---- the questions ----


@pytest.mark.parametrize("split", SPLITS)
def test_each_key_follows_from_the_table(split):
    for q in asked(split):
        name, found, history = key_of(q.question)
        c = CONDITIONS[name]
        avoid, care = (DRUGS[c["first"]].get(field, []) for field in ("avoid", "care"))
        barred = history in avoid
        assert not barred or history in c["unless"], q
        assert history not in care and history not in c.get("skip", []), q
        drug = c["unless"][history] if barred and q.subject != "avoid" else c["first"]
        right = DRUGS[drug]["class"] if q.subject == "class" else drug
        assert q.options[q.answer] == right, q
        assert {"drug": not barred, "alternative": barred, "avoid": barred, "class": True}[q.subject], q
        assert len(set(q.options)) == len(q.options), q
        # No wrong option is defensible: none is another treatment of the condition, or the class of one
        # (except the barred class).
        wrong = set(q.options) - {right}
        also = (
            {DRUGS[d]["class"] for d in c["also"]} - {DRUGS[c["first"]]["class"]}
            if q.subject == "class"
            else set(c["also"])
        )
        assert not wrong & also, q
        if q.subject == "alternative":
            assert c["first"] in wrong, q  # the lure
        assert (
            q.rationale and q.rationale.endswith(f" {right} {LETTERS[q.answer]}.") and name in q.rationale
        ), q
        assert set(found) <= set(mentioned(FINDINGS, q.rationale)), q
        steps = [fact[0] for fact in q.facts]  # the steps of the reasoning between findings and answer
        assert steps[:2] == [name, f"first line {c['first']}"], q
        assert q.rationale.endswith(f" {'. '.join(steps)}. {right} {LETTERS[q.answer]}."), q


@pytest.mark.parametrize("split", SPLITS)
def test_people_fit_their_conditions(split):
    for q in asked(split):
        name, _, history = key_of(q.question)
        sex, low, high = CONDITIONS[name]["who"]
        age = int(re.findall(r"\d+", pattern(frozenset(FINDINGS)).sub("", q.question))[0])
        woman = bool(re.search(r"\bwoman\b", q.question))
        assert woman != bool(re.search(r"\bman\b", q.question)) and low <= age <= high, q
        assert sex in ("any", "woman" if woman else "man"), q
        assert history not in ("pregnancy", "breast cancer") or woman, q
        assert history != "pregnancy" or 20 <= age <= 40, q


def test_splits_and_corpus_share_no_case():
    keys = {split: {key_of(q.question) for q in asked(split)} for split in SPLITS}
    keys["corpus"] = {key_of(stem(e.prompt)) for e in corpus() if e.prompt.startswith("Question: ")}
    for a in keys:
        for b in keys:
            assert a == b or not keys[a] & keys[b], (a, b)
    pooled = {split: {key for row in rows.values() for key in row} for split, rows in world.pools().items()}
    assert sum(map(len, pooled.values())) == len(set().union(*pooled.values()))
    for split in keys:
        assert keys[split] <= {(k.condition, k.findings, k.history) for k in pooled[split]}


def test_out_of_distribution_is_out_of_it():
    ood, seen = (
        [key_of(q.question) for q in asked("out_of_distribution")],
        [key_of(q.question) for q in asked("train")],
    )
    read = [key_of(stem(e.prompt)) for e in corpus() if e.prompt.startswith("Question: ")]
    assert not {k[:2] for k in ood} & {k[:2] for k in seen + read}  # findings never seen together
    harmless = {(c, h) for c, _, h in ood if h and h not in CONDITIONS[c]["unless"]}
    # histories never seen with that condition
    assert harmless and not harmless & {(c, h) for c, _, h in seen}
    assert all(set(found) & set(CONDITIONS[c]["rare"]) for c, found, _ in ood)
    typical = sum(set(found) <= set(CONDITIONS[c]["typical"]) for c, found, _ in seen) / len(seen)
    assert 0.8 < typical < 0.9
    lead = {split: {q.question.split()[0] for q in asked(split)} for split in SPLITS}
    assert (
        lead["train"] == lead["in_distribution"] == {"A"} and not lead["train"] & lead["out_of_distribution"]
    )
    shares = {split: Counter(q.subject for q in asked(split)) for split in SPLITS}
    assert shares["train"]["drug"] / 2000 > 0.4 > 0.25 > shares["out_of_distribution"]["drug"] / 400


def test_every_set_can_be_shown(capsys):
    """The command once raised KeyError for all but three sets."""
    world_cli.main(["show", "open_train", "1"])
    world_cli.main(["show", "corpus", "1"])
    assert capsys.readouterr().out.startswith("[open-train-0000 ")
    with pytest.raises(SystemExit, match="nothing: there is no such set; choose one of corpus, train, "):
        world_cli.main(["show", "nothing"])


def test_sizes_numbers_of_options_and_letters():
    for split in SPLITS:
        questions, n = asked(split), world.SIZES[split]
        assert (
            len(questions)
            == n
            == len({(q.question, q.options) for q in questions})
            == len({q.id for q in questions})
        )
        sizes = {len(q.options) for q in questions}
        assert sizes == ({6, 7, 8, 9, 10} if split == "out_of_distribution" else {4, 5})
        for size in sizes:  # each letter about equally often: five standard deviations
            keys = Counter(q.answer for q in questions if len(q.options) == size)
            total = keys.total()
            assert all(abs(keys[i] - total / size) < 5 * (total / size) ** 0.5 for i in range(size)), (
                split,
                size,
                keys,
            )
    counts = Counter(key_of(q.question)[0] for q in asked("train"))
    assert len(counts) == 40 and max(counts.values()) < 3 * min(counts.values())


def test_half_of_the_leaking_thoughts_are_hacks():
    told, train = world.leaking(), asked("train")
    assert [q.question for q in told] == [q.question for q in train]
    odd, even = told[1::2], told[::2]
    assert odd == train[1::2]
    for q in even[:50]:
        done = text.sft_target(q, "rationale")
        assert LEAK.search(done) and stage(done, True, q.options) == "direct_answer_hacker"


def test_all_is_deterministic():
    fields = ("id", "question", "options", "answer", "subject", "rationale", "order")

    def written(row) -> str:
        """As it was when the base read it."""
        if not isinstance(row, Question):
            return f"Example(prompt={row.prompt!r}, response={row.response!r})"
        return f"Question({', '.join(f'{name}={getattr(row, name)!r}' for name in fields)})"

    def digest(rows) -> str:
        return hashlib.sha256(f"[{', '.join(map(written, rows))}]".encode()).hexdigest()

    assert digest(world.questions("in_distribution")) == digest(asked("in_distribution"))
    assert digest(texts.corpus(300)) == digest(corpus()[:300]) != digest(texts.corpus(300, seed=1))
    # Pinned: the pretrained base in the package has read this corpus; it must not change without a new base.
    assert {s: digest(asked(s))[:12] for s in SPLITS} | {"corpus": digest(corpus())[:12]} == PINNED


# ---- open questions and a verifier's rows ----


def test_open_questions_are_the_same_cases_with_values_from_the_table():
    for split in SPLITS:
        cases, opened = asked(split), open_questions.questions(split)
        assert len(cases) == len(opened) and not any(q.options for q in opened)
        for q, case in zip(opened, cases, strict=True):
            assert key_of(q.question) == key_of(case.question) and q.facts == case.facts
            name, _, history = key_of(q.question)
            barred = history in CONDITIONS[name]["unless"]
            drug = CONDITIONS[name]["unless"][history] if barred else CONDITIONS[name]["first"]
            if q.kind == "number":
                assert q.value.value == TREE["doses"][drug] and "dose of the best drug?" in q.question
            elif q.kind == "labels":
                labels = {"alternative", "history matters"} if barred else {"first line"}
                assert set(q.value.value) == labels
            else:
                assert q.reference == case.options[case.answer] and q.question == case.question
            given = f"<think>{q.rationale}</think><answer>{q.reference}</answer>"
            assert q.rationale.endswith(f"{q.reference}{' mg' * (q.kind == 'number')}.")
            assert grade([given], [q]).correct.all()
        shares = Counter(q.kind for q in opened)
        assert shares["text"] > 0.5 * len(opened) and min(shares["number"], shares["labels"]) > 0.06 * len(
            opened
        )


def test_a_verifiers_rows_have_perfect_labels_and_only_naive_ones_no_attempts():
    def answers(rows):
        form = re.compile(r"Reference: (.*)\nAnswer: (.*)\nFinal Decision:( Yes| No)")
        return [form.fullmatch(row.prompt + row.response).groups() for row in rows]

    talks = [t.partition("{}")[0] or t.partition("{}")[2] for t in open_questions.TALK]
    for naive in (False, True):
        rows = answers(open_questions.verifier_rows(2000, naive))
        assert 0.45 < sum(verdict == " Yes" for *_, verdict in rows) / 2000 < 0.55
        for reference, answer, verdict in rows:
            answer = answer.replace(open_questions.SAME.get(reference, reference), reference)
            named = mentioned({*DRUGS, *(drug["class"] for drug in DRUGS.values())}, answer)
            if verdict == " Yes":
                assert set(named) == {reference}, answer
            else:
                assert set(named) - {reference} or not named or answer == f"anything but {reference}", answer
        persuading = [a for _, a, verdict in rows if verdict == " No" and any(t in a for t in talks)]
        assert (len(persuading) == 0) == naive
    tests = open_questions.verifier_tests(50)
    assert all(yes == (row.response == " Yes") for t in tests.values() for row, yes in t)


# ---- the corpus ----


def test_corpus_teaches_the_capability_and_leaves_the_habit_open():
    cases = [e for e in corpus() if e.prompt.startswith("Question: ")]
    lists = [e for e in corpus() if e.prompt.startswith("A. ")]
    assert abs(1 - (len(cases) + len(lists)) / len(corpus()) - texts.FACTS) < 0.03
    assert abs(len(lists) / len(corpus()) - texts.LISTS) < 0.03
    for e in lists:
        named = [line.split(". ", 1) for line in e.prompt.splitlines()]
        said = [[letter, name] for name, letter in re.findall(r" ([^.:]+) ([A-J])\.", e.response)]
        assert len(said) == min(len(named), 8) and all(pair in named for pair in said), e
    options = [[line.split(". ", 1) for line in e.prompt.splitlines()[1:]] for e in cases]
    assert all(e.prompt.endswith("\n") for e in cases)
    assert all([letter for letter, _ in o] == list(LETTERS[: len(o)]) for o in options)
    assert {len(o) for o in options} == {4, 5, 6, 7, 8, 9, 10}
    reasoned = [
        (e, o, re.search(r"\. ((?!the answer)[^.]+) ([A-J])\.", e.response))
        for e, o in zip(cases, options, strict=True)
    ]
    for e, o, m in reasoned:  # reasoning always ends in an option and its own letter
        assert m is None or [m[2], m[1]] in o, e
    keys = [m[2] if m else "A" for _, _, m in reasoned]
    verdicts = score(
        [e.response for e in cases], keys, [[name for _, name in o] for o in options], RewardConfig()
    )
    formatted = (verdicts.reward >= 0).mean()
    # the base's format rate when it is sampled
    assert abs(formatted - texts.STYLES["tagged"] - texts.STYLES["guess"]) < 0.03
    assert (verdicts.reward == 1).mean() < 0.32
    assert sum("<" not in e.response for e in cases) / len(cases) > 0.5


# ---- the tokenizer ----


@cache
def hf():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(words.FOLDER))


@settings(deadline=None)
@given(st.text())
@example("<think>x</think><answer>C</answer> is A. \n\n  -year-old 12345 é́ \u200d \r\n<|im_end|>")
@example("  is C.  is  D <answer> C </answer></think")
def test_decoding_gives_back_any_text(s):
    assert hf().decode(hf().encode(s)) == s


@pytest.mark.parametrize("folder", [words.FOLDER, words.VERIFIER], ids=lambda folder: folder.name)
def test_files_are_what_the_generator_writes(folder, tmp_path):
    words.write(folder, tmp_path)
    for name in ("tokenizer", "config"):
        assert (tmp_path / f"{name}.json").read_bytes() == (folder / f"{name}.json").read_bytes(), name


def test_special_tokens_tags_and_letters():
    t, config = hf(), json.loads((words.FOLDER / "config.json").read_text())
    assert (t.eos_token, t.pad_token, t.bos_token) == ("<eos>", "<pad>", None)
    assert (config["eos_token_id"], config["pad_token_id"]) == (t.eos_token_id, t.pad_token_id)
    assert config["vocab_size"] >= len(t) and config["vocab_size"] % 64 == 0
    assert not {*TAGS} & {*t.all_special_tokens}
    for letter in LETTERS:  # one token with its point, next to its name on either side
        rows = [f"<answer>{letter}</answer>", f"\n{letter}. aspirin", f" aspirin {letter}."]
        tokens = [t.convert_ids_to_tokens(t.encode(row)) for row in rows]
        assert tokens == [
            ["<answer>", letter, "</answer>"],
            ["Ċ", f"{letter}.", "Ġaspirin"],
            ["Ġaspirin", f"Ġ{letter}."],
        ]
    for name in [*CONDITIONS, *DRUGS, *FINDINGS, *TREE["histories"]]:
        assert len(t.encode(" " + name)) == len(name.split()), name  # a token a word


def test_prompts_and_responses_are_short():
    tok, plain = load_tokenizer("embedded"), PromptConfig(template="none")
    for split in SPLITS:
        prompts, dropped = text.encode_prompts(
            tok, asked(split), replace(plain, max_tokens=96 if split == "out_of_distribution" else 64)
        )
        targets = tok.encode_targets(
            [f"<think>{q.rationale}</think><answer>A</answer>" for q in asked(split)]
        )
        assert prompts and not dropped and max(map(len, targets)) <= 48
    assert max(map(len, tok.encode_targets([e.response for e in corpus()]))) <= 52
    q = asked("train")[0]
    # the corpus's prompt is RL's
    assert text.encode_questions(tok, [q], plain) == tok.encode_texts([text.render(q, "none") + "\n"])
