"""The reward rule against a corpus judged by hand, and against two references too slow to use and too plain
to be wrong.
"""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medrlvr_jax import cli
from medrlvr_jax.config.schema import RewardConfig
from medrlvr_jax.data.question import DataError
from medrlvr_jax.rewards import REASONS, score
from medrlvr_jax.rewards.penalties import LEAK, find_leaks
from medrlvr_jax.rewards.verdicts import random_rewards
from medrlvr_jax.tools.score_file import BLOCK, score_file

WHITE = " \t\n\v\f\r"
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
FOUR = ["Aspirin", "Heparin", "Warfarin", "Insulin"]
MODES = ["paper", "strict", "direct"]
CORPUS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "reward_corpus.jsonl").read_text("utf-8").splitlines()
]


def paper_reference(text: str, options: list[str]) -> str:
    """Every start, every end behind it: the first pair that fits. Quadratic at least."""
    for start in range(len(text)):
        if not text.startswith("<think>", start):
            continue
        for end in range(start + len("<think>") + 1, len(text)):
            if not text.startswith("</think>", end):
                continue
            rest = text[end + len("</think>") :].lstrip(WHITE)
            if not rest.startswith("<answer>"):
                continue
            content, closed, _ = rest[len("<answer>") :].partition("</answer>")
            if closed and content.strip(WHITE) in list("ABCDEFGHIJ"[: len(options)]):
                return content.strip(WHITE)
    return ""


def strict_reference(text: str, options: list[str]) -> str:
    """Take the four tags off one by one; then try every form of every option."""
    text = text.strip(WHITE)
    if any(text.count(tag) != 1 for tag in TAGS) or not (
        text.startswith("<think>") and text.endswith("</answer>")
    ):
        return ""
    thought, _, rest = text.removeprefix("<think>").removesuffix("</answer>").partition("</think>")
    between, _, content = rest.partition("<answer>")
    if not thought.strip(WHITE) or between.strip(WHITE) or "<answer>" in thought or "</answer>" in thought:
        return ""
    content = content.strip(WHITE)
    for letter, option in zip("ABCDEFGHIJ", options, strict=False):
        own = option.strip(WHITE)
        if content == letter or (
            own
            and content[:1] == letter
            and content[1:2] in (".", ")", ":")
            and content[2:].strip(WHITE) == own
        ):
            return letter
    return ""


def direct_reference(text: str, options: list[str]) -> str:
    """With a thought in front, and without tags of its own, it would be strict."""
    thinks = "<think>" in text or "</think>" in text
    return "" if thinks else strict_reference(f"<think>x</think>{text}", options)


REFERENCE = {"paper": paper_reference, "strict": strict_reference, "direct": direct_reference}


def judge(mode: str, rows: list[dict]):
    return score(
        [r["completion"] for r in rows],
        [r["answer"] for r in rows],
        [r["options"] for r in rows],
        RewardConfig(mode=mode),
    )


def test_corpus_is_large_and_without_twins():
    assert len(CORPUS) >= 300
    assert len({(r["completion"], r["answer"], tuple(r["options"])) for r in CORPUS}) == len(CORPUS)
    for mode in MODES:
        assert min(sum(r[mode]["reward"] == value for r in CORPUS) for value in (-1, 0, 1)) >= 15


@pytest.mark.parametrize("mode", MODES)
def test_corpus_verdicts(mode):
    """Precision and recall 1.0: not one line is judged otherwise than by hand; nor does the reference differ
    from the hand.
    """
    got = judge(mode, CORPUS)
    wrong = [
        (row["note"], row[mode], answer, reason)
        for row, reward, answer, reason in zip(CORPUS, got.reward, got.answer, got.reason, strict=True)
        if (reward, answer) != (row[mode]["reward"], row[mode]["answer"] or "")
    ]
    assert wrong == []
    assert [REFERENCE[mode](r["completion"], r["options"]) for r in CORPUS] == [
        r[mode]["answer"] or "" for r in CORPUS
    ]
    assert got.reward.dtype == np.float32 and got.format_ok.dtype == got.correct.dtype == bool


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_rows(mode):
    """What stands in the other rows changes nothing: not a tag begun in one and ended in the next, not a lone
    surrogate.
    """
    batch = judge(mode, CORPUS)
    for i, row in enumerate(CORPUS):
        alone = judge(mode, [row])
        for field in ("reward", "format_ok", "correct", "answer", "reason"):
            assert getattr(alone, field)[0] == getattr(batch, field)[i], (field, row["note"])


@pytest.mark.parametrize("mode", MODES)
def test_reasons_fit_the_verdicts(mode):
    got = judge(mode, CORPUS)
    assert set(got.reason) <= set(REASONS)
    assert np.array_equal(got.reason == "correct", got.reward == 1) and np.array_equal(
        got.reason == "wrong", got.reward == 0
    )
    assert np.array_equal(got.answer != "", got.format_ok) and np.array_equal(got.correct, got.reward == 1)
    of_direct = {"has_think", "text_before_answer"}
    if mode == "strict":
        assert set(got.reason) == set(REASONS) - of_direct
    if mode == "direct":
        assert set(REASONS) - set(got.reason) == {
            "no_think",
            "unclosed_think",
            "text_between",
            "empty_think",
            "text_before_think",
        }


@pytest.mark.parametrize(
    ("completion", "paper", "strict", "direct"),
    [
        ("C", "no_think", "no_think", "no_answer"),
        ("<think>x", "unclosed_think", "unclosed_think", "has_think"),
        ("</think><think>x<answer>C</answer>", "unclosed_think", "tags_out_of_order", "has_think"),
        ("<think>x</think>C", "no_answer", "no_answer", "has_think"),
        ("<think>x</think><answer>C", "unclosed_answer", "unclosed_answer", "has_think"),
        ("<think>x</think>so<answer>C</answer>", "text_between", "text_between", "has_think"),
        ("<think></think><answer>C</answer>", "empty_think", "empty_think", "has_think"),
        ("<think> </think><answer>C</answer>", "correct", "empty_think", "has_think"),
        ("<think>x</think><answer> </answer>", "empty_answer", "empty_answer", "has_think"),
        ("<think>x</think><answer>A or C</answer>", "not_one_letter", "not_one_letter", "has_think"),
        ("<think>x</think><answer>E</answer>", "letter_not_an_option", "letter_not_an_option", "has_think"),
        (
            "<think>x</think><answer>E. Warfarin</answer>",
            "not_one_letter",
            "letter_not_an_option",
            "has_think",
        ),
        ("<think>x</think><answer>C. Aspirin</answer>", "not_one_letter", "other_text", "has_think"),
        ("<think>x</think><answer>C. Warfarin</answer>", "not_one_letter", "correct", "has_think"),
        ("<think>x</think><answer>C</answer><answer>A</answer>", "correct", "several_answers", "has_think"),
        ("<think><think>x</think><answer>C</answer>", "correct", "repeated_tags", "has_think"),
        ("so <think>x</think><answer>A</answer>", "wrong", "text_before_think", "has_think"),
        ("<think>x</think><answer>A</answer>.", "wrong", "text_after_answer", "has_think"),
        ("<answer>C</answer>", "no_think", "no_think", "correct"),
        (" <answer>A. Aspirin</answer>\n", "no_think", "no_think", "wrong"),
        ("so <answer>C</answer>", "no_think", "no_think", "text_before_answer"),
        ("<answer>C</answer>.", "no_think", "no_think", "text_after_answer"),
        ("<answer>C</answer><answer>C</answer>", "no_think", "several_answers", "several_answers"),
        ("<answer>C</answer></answer>", "no_think", "repeated_tags", "repeated_tags"),
        ("</answer>C<answer>", "no_think", "no_think", "tags_out_of_order"),
        ("<answer>C", "no_think", "no_think", "unclosed_answer"),
        ("<answer>\n</answer>", "no_think", "no_think", "empty_answer"),
        ("<answer>c</answer>", "no_think", "no_think", "not_one_letter"),
        ("<answer>E</answer>", "no_think", "no_think", "letter_not_an_option"),
        ("<answer>C. Aspirin</answer>", "no_think", "no_think", "other_text"),
    ],
)
def test_reasons(completion, paper, strict, direct):
    row = {"completion": completion, "answer": "C", "options": FOUR}
    assert [judge(mode, [row]).reason[0] for mode in MODES] == [paper, strict, direct]


JUNK = [
    "A",
    "C",
    "E",
    "J",
    "Ｃ",
    "C. Warfarin",
    "A) Heparin",
    ".",
    "<",
    "</",
    "<th",
    "ink>",
    ">",
    "é",
    "\0",
    "\ud800",
    "x",
]
GAPS = st.lists(st.sampled_from(["", "", "", " ", "\n", "x", "\u00a0", *TAGS]), min_size=5, max_size=5)
COMPLETIONS = st.one_of(
    st.lists(st.sampled_from([*TAGS * 3, *WHITE, *JUNK]), max_size=12).map("".join),
    GAPS.map(
        lambda gaps: "".join(
            a + b for a, b in zip(gaps, ["<think>", "x</think>", "<answer>", "C", "</answer>"], strict=True)
        )
    ),
    GAPS.map(
        lambda gaps: "".join(a + b for a, b in zip(gaps[2:], ["<answer>", "C", "</answer>"], strict=True))
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(COMPLETIONS, st.integers(3, 10)), max_size=6), st.sampled_from(MODES))
@example(
    [("<think>x</think><ans", 4), ("wer>C</answer>", 4), ("", 4), ("<think>x</think><answer>C</answer>", 4)],
    "paper",
)
@example([("<think>x</think><answer>C</answer", 4), (">", 4)], "strict")
@example([("<think>a</think><answer>C</answer>", 4), ("</think>", 3), ("<answer>A</answer>", 3)], "paper")
@example(
    [("<think>a</think>", 4), ("<answer>C</answer>", 4), ("<think>a</think><answer>", 4), ("C</answer>", 4)],
    "paper",
)
@example([("<think>a</think><answer>G.</answer>", 10)], "strict")
@example(
    [("<answer>C", 4), ("</answer>", 4), ("<answer>C</answer>", 4), ("<answer>C</answer><answer>", 4)],
    "direct",
)
def test_agrees_with_the_reference(rows, mode):
    options = [[*FOUR, "x", "A", " ", ".", "<think>", "é"][:n] for _, n in rows]
    completions = [completion for completion, _ in rows]
    got = score(completions, ["C"] * len(rows), options, RewardConfig(mode=mode))
    assert got.answer.tolist() == [REFERENCE[mode](c, o) for c, o in zip(completions, options, strict=True)]
    assert np.array_equal(got.correct, got.answer == "C")
    alone = [
        score([c], ["C"], [o], RewardConfig(mode=mode)).reason[0]
        for c, o in zip(completions, options, strict=True)
    ]
    assert got.reason.tolist() == alone


def test_rewards_are_the_settings():
    rows = [
        {"completion": f"<think>x</think><answer>{a}</answer>", "answer": "C", "options": FOUR}
        for a in ("C", "A", "E")
    ]
    config = RewardConfig(correct=2.5, wrong=-0.25, unformatted=-3)
    got = score([r["completion"] for r in rows], "CCC", [FOUR] * 3, config)
    assert got.reward.tolist() == [2.5, -0.25, -3]


def test_a_toss_knows_only_step_question_and_sample():
    config = RewardConfig(wrong=-2, correct=3, random=0.25)
    ids = np.arange(500, dtype=np.uint32)
    got = random_rewards([1, 2], ids, 8, config)
    assert got.dtype == np.float32 and set(got.ravel()) == {-2, 3} and abs((got == 3).mean() - 0.25) < 0.03
    # whichever process has which questions
    assert np.array_equal(random_rewards([1, 2], ids[::-1], 8, config), got[::-1])
    assert np.array_equal(random_rewards([1, 2], ids, 4, config), got[:, :4])
    # another step, another coin
    assert abs((random_rewards([1, 3], ids, 8, config) == got).mean() - (0.25**2 + 0.75**2)) < 0.03
    assert got[0].tolist() == [-2, 3, -2, 3, -2, -2, -2, 3]
    assert (random_rewards([1, 2], ids, 8, RewardConfig(random=0)) == 0).all() and (
        random_rewards([1, 2], ids, 8, RewardConfig(random=1)) == 1
    ).all()


BAITS = {
    "opening tags": "<think>",
    "closing tags": "</think>",
    "thoughts": "<think>x</think>",
    "answers": "<answer>C</answer>",
    "places without a letter": "<think>x</think> <answer> E </answer>",
    "thoughts that almost reach an answer": "<think>x</think> \n\t ",
    "answers that almost end": "<think>x</think><answer>C</answer",
    "brackets": "<",
    "half tags": "</",
    "blanks": " ",
    "lone surrogates": "\ud800",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", ["", "<think>x</think>", "<think>x</think><answer>C. "])
def test_time_is_linear(mode, head):
    """Baits that make backtracking quadratic or worse: four times the text takes at most ten times as long, 1
    MB less than a second.

    The thread's own time, so that whatever else runs on the machine, or on XLA's threads, does not count.
    """

    def seconds(text):
        start = time.thread_time()
        score([text], ["C"], [FOUR], RewardConfig(mode=mode))
        return time.thread_time() - start

    for name, bait in BAITS.items():
        small, large = ((head + bait * (size // len(bait)) + "</answer>") for size in (250_000, 1_000_000))
        times = min(seconds(small) for _ in range(3)), min(seconds(large) for _ in range(3))
        assert times[1] < max(10 * times[0], 0.05) and times[1] < 1, (name, times)


@pytest.mark.parametrize("mode", MODES)
def test_large_and_dense(mode):
    """10 MB in one completion, and 5,000 repeated tags in one of many rows, judged right and in time."""
    gap = " \n" * 2_500_000
    rows = [
        f"<think>{'x <' * 3_000_000}</think><answer>C</answer>",
        f"<think>{gap}x</think>{gap}<answer>C</answer>",
    ]
    rows += [
        "<think>a</think>" * 5000 + "<answer>C</answer>",
        "<think>" + "</think>" * 5000 + "<answer>C</answer>",
    ]
    start = time.thread_time()
    got = score(rows, ["C"] * 4, [FOUR] * 4, RewardConfig(mode=mode))
    assert time.thread_time() - start < 5
    assert got.format_ok.tolist() == [mode != "direct", mode != "direct", mode == "paper", mode == "paper"]


@pytest.mark.parametrize(
    ("completions", "answers", "options", "complaint"),
    [
        (["x"], ["A", "B"], [FOUR], "1 completions, 2 answers"),
        (["x", "y"], ["A", "E"], [FOUR, FOUR], "row 1: answer 'E' with 4 options"),
        (["x"], ["AB"], [FOUR], "row 0: answer 'AB'"),
        (["x"], [""], [FOUR], "row 0: answer ''"),
        (["x"], ["A"], [["one"]], "1 options"),
        (["x"], ["A"], [list("abcdefghijk")], "11 options"),
        (["x", None], ["A", "A"], [FOUR, FOUR], "row 1: its completion is None"),
    ],
)
def test_refuses_rows_that_do_not_fit(completions, answers, options, complaint):
    with pytest.raises(DataError, match=complaint):
        score(completions, answers, options, RewardConfig())


@pytest.mark.parametrize("mode", MODES)
def test_file_gives_the_same_verdicts(tmp_path, mode):
    """Line by line, in order, whether options are a list or a dict in any order, in one block or several."""
    # no loader gives such
    rows = [row for row in CORPUS if not any("\ud800" <= c <= "\udfff" for c in "".join(row["options"]))] * 20
    with (tmp_path / "in.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            options = (
                dict(reversed(list(zip("ABCDEFGHIJ", row["options"], strict=False))))
                if i % 2
                else row["options"]
            )
            file.write(
                json.dumps(
                    {"completion": row["completion"], "answer": row["answer"], "options": options, "id": i}
                )
                + "\n"
            )
    reasons = score_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", RewardConfig(mode=mode, correct=0.1))
    assert reasons.total() == len(rows) > 2 * BLOCK
    got, batch = [json.loads(line) for line in (tmp_path / "out.jsonl").open()], judge(mode, rows)
    assert [line["answer"] for line in got] == [row[mode]["answer"] for row in rows]
    assert reasons == Counter(line["reason"] for line in got)
    assert [line["reason"] for line in got] == batch.reason.tolist() and [
        line["format_ok"] for line in got
    ] == batch.format_ok.tolist()
    assert {line["reward"] for line in got} == {-1.0, 0.0, 0.1} and set(got[0]) == {
        "reward",
        "format_ok",
        "answer",
        "reason",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_the_prompt_gave_of_a_completion_is_judged_with_it(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        json.dumps(GOOD | {"completion": "x</think><answer>C</answer>"}) + "\n"
    )
    for prefill, reason in (("", "no_think"), ("<think>\n", "correct")):
        out = tmp_path / f"{reason}.jsonl"
        assert score_file(tmp_path / "in.jsonl", out, RewardConfig(), prefill) == {reason: 1}


GOOD = {"completion": "<think>x</think><answer>C</answer>", "answer": "C", "options": FOUR}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "not JSON"),
        (b'"\xff"', "byte 2 is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b"[]", r"\[\] is not an object with fields"),
        (json.dumps(GOOD)[:-1].encode() + b', "answer": "D"}', "field 'answer' is given twice"),
        (json.dumps(GOOD | {"completion": None}).encode(), "field completion: None is not a string"),
        (
            json.dumps({"answer": "C", "options": FOUR}).encode(),
            r"field completion: None .* the line has \['answer', 'options'\]",
        ),
        (
            json.dumps(GOOD | {"answer": "E"}).encode(),
            "answer: 'E' is not the letter of one of its 4 options",
        ),
        (json.dumps(GOOD | {"answer": ["C", "C"]}).encode(), "names no option, or the same option twice"),
        (json.dumps(GOOD | {"answer": 2}).encode(), "answer: 2 is a number where a letter is needed"),
        (json.dumps(GOOD | {"options": "ABCD"}).encode(), "options: 'ABCD' is neither a list nor an object"),
        (json.dumps(GOOD | {"options": ["one"]}).encode(), "there are 1; a question has 2 to 10"),
        (
            json.dumps(GOOD | {"options": list("abcdefghijk")}).encode(),
            "there are 11; a question has 2 to 10",
        ),
        (json.dumps(GOOD | {"options": ["a", "b", 3]}).encode(), "options 3: 3 is not a string"),
        (json.dumps(GOOD | {"options": ["a", " ", "c"]}).encode(), "options 2: ' ' is blank"),
        (json.dumps(GOOD | {"options": {"A": "a", "C": "c"}}).encode(), "are not A, B, C … without a gap"),
        (
            json.dumps(GOOD | {"options": {str(i): "a" for i in range(12)}}).encode(),
            "are not A, B, C … without a gap",
        ),
    ],
)
def test_file_with_a_bad_line_is_refused_whole(tmp_path, line, complaint):
    (tmp_path / "in.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=f"in.jsonl, line 2: .*{complaint}"):
        score_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", RewardConfig())
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_file_is_read_as_questions_are(tmp_path):
    """A byte-order mark, blank lines, "b" for B, options that bring their letters: what the loader of
    questions takes.
    """
    rows = [
        GOOD,
        GOOD | {"answer": " c "},
        GOOD | {"options": [f"{letter}. {text}" for letter, text in zip("ABCD", FOUR, strict=True)]},
    ]
    # half a character, as a tokenizer may give it
    rows.append(GOOD | {"completion": "<think>\ud800</think><answer>C</answer>"})
    lines = [json.dumps(row) for row in rows]
    for i, text in enumerate(("\ufeff" + "\n\n".join(lines) + "\n \n", f"[{','.join(lines)}]")):
        (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
        assert score_file(tmp_path / "in.jsonl", tmp_path / f"{i}.jsonl", RewardConfig()) == {"correct": 4}


def test_file_is_never_overwritten(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(GOOD))  # the last line may do without its end
    target.write_text("precious")
    with pytest.raises(DataError, match="exists already"):
        score_file(source, target, RewardConfig())
    assert target.read_text() == "precious"
    target.unlink()
    assert score_file(source, target, RewardConfig()).total() == 1
    assert target.read_text() == '{"reward": 1.0, "format_ok": true, "answer": "C", "reason": "correct"}\n'
    with pytest.raises(DataError, match=r"No such file.*give a JSONL file of completions"):
        score_file(tmp_path / "none.jsonl", tmp_path / "new.jsonl", RewardConfig())
    with pytest.raises(DataError, match="the folder does not exist"):
        score_file(source, tmp_path / "none" / "new.jsonl", RewardConfig())


COMPOSITE = RewardConfig(mode="paper", leak_penalty=0.5, before_penalty=0.3)
FIFTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>Heparin acts at once.</think><answer>A</answer>", 1.0),
        ("<think>So the answer is heparin.</think><answer>A</answer>", 0.5),
        ("<think>MY FINAL\n CHOICE should be the first</think><answer>B</answer>", -0.5),
        ("<think>Option B is wrong: it is slow.</think><answer>A</answer>", 1.0),
        ("<think>This is the answering machine.</think><answer>A</answer>", 1.0),
        ("The answer is A. <think>Acts at once.</think><answer>A</answer>", 1.0),  # before, and short
        ("<think>Acts at once.</think><answer>A</answer> The answer is A.", 1.0),  # after
        (f"{FIFTEEN} <think>Acts at once.</think><answer>A</answer>", 1.0),
        (f" {FIFTEEN}\n\nsixteen<think>Acts at once.</think><answer>A</answer>", 0.7),
        (f"{FIFTEEN} sixteen <think>The answer is A</think><answer>A</answer>", 0.2),
        (f"{FIFTEEN} sixteen", -1.0),  # no <think>: nothing stands before it
        ("<think>The answer is A", -1.5),  # a thought that never ends ends with the text
        ("<think>β</think><answer>A</answer>\n<think>The answer is A</think>", 1.0),  # not the first thought
    ],
)
def test_the_composite_reward(completion, reward):
    rows = ["<think>x</think>", completion, "<think>I choose A"]  # neighbours must not leak into it
    verdicts = score(rows, ["A"] * 3, [["heparin", "aspirin"]] * 3, COMPOSITE)
    assert verdicts.reward == pytest.approx([-1.0, reward, -1.5], abs=1e-6)
    parts = verdicts.components
    assert verdicts.reward == pytest.approx(
        parts["rule"] - 0.5 * parts["leak"] - 0.3 * parts["before"], abs=1e-6
    )
    assert (
        verdicts.reason[1]
        == score([completion], ["A"], [["heparin", "aspirin"]], RewardConfig(mode="paper")).reason[0]
    )


STATED = """\
The answer is A.
So the answer is heparin.
My final choice should be the first one.
The correct answer here must be C, because of the rash.
The best option is to give heparin.
The only right answer is definitely C.
It is B, and it must be B, since B B B B B B.
Everything points to one drug. It must be (C).
So that's clearly option D.
This is B because of the rash.
Fever and a stiff neck: option B is correct.
C is the answer.
(B) must be right, A cannot be.
Option D is the most likely one.
B is clearly the best choice.
Answer: C
Final answer: C. The calf is swollen.
My choice: heparin
I choose A.
I will go with heparin.
I'd pick C here.
I would select heparin because it acts at once.
B. Because ceftriaxone covers the usual bacteria well.
B because of the rash.
Therefore, the answer is B.
Obviously this is C, no doubt.
I'm going with A.
Hence B.
That must be D because of the fever.
We choose C.
The patient needs heparin, which is option B.
So, answer B.
Correct answer is C.
The most likely answer is C.""".split("\n")
WEIGHED = """\
Fever and neck stiffness suggest meningitis. Option A is unlikely because there is no rash. Option C is ruled out by the normal glucose.
The right choice is between ceftriaxone and ampicillin; listeria is unlikely at this age.
Many would pick aspirin, and I would pick it too if there were no allergy, but there is one.
Option B is wrong: it is slow.
Option A is possible, option B is not correct, and C is less likely.
A is contraindicated in pregnancy. B acts too late. C remains.
The answer is not A, since there is no rash.
The answer is probably not the first.
The best option is either of the two.
The answer is one of the last two.
The answer is unclear so far.
The correct choice is determined by the renal function.
This is E. coli, a Gram-negative rod.
It is B cell lymphoma by the smear.
This is A fib with a rapid rate.
It is C. difficile, after the antibiotics.
It is a clot.
Vitamin B is deficient here, and hepatitis B is not likely.
Should I choose heparin? If I choose it, platelets must be watched.
What would I select in pregnancy?
The answering machine and the options: all are drugs.
Patients choose and doctors pick the dose.
A. Aspirin blocks platelets. B. Heparin acts on thrombin. Heparin acts at once.
Given the allergy, aspirin must not be used, so heparin it is.
here pyuria, loin tenderness suggest pyelonephritis. first line ciprofloxacin. myopia allows it. ciprofloxacin D.
If the answer were A, we would see a rash.
Option C is a beta blocker and option D is a diuretic.
Is the answer A? There is no fever.
The correct answer must explain both findings.
The final option is not indicated.
A is less likely to be correct.
A is true of all lupus patients, so it does not discriminate.
B is not the answer.
The answer should be found among the antibiotics.
It is A that needs a look: aspirin blocks platelets.""".split("\n")


@pytest.mark.parametrize(("thoughts", "leak"), [(STATED, True), (WEIGHED, False)], ids=["stated", "weighed"])
def test_a_leak_is_a_statement_of_the_answer_not_a_word_about_an_option(thoughts, leak):
    completions = [f"<think>{thought}</think><answer>A</answer>" for thought in thoughts]
    paid = score(
        completions, ["A"] * len(thoughts), [FOUR] * len(thoughts), RewardConfig(leak_penalty=0.5)
    ).reward
    assert [
        t for t, match in zip(thoughts, find_leaks(thoughts), strict=True) if (match is not None) != leak
    ] == []
    assert [
        t
        for t, match in zip(thoughts, map(LEAK.search, thoughts), strict=True)
        if (match is not None) != leak
    ] == []
    assert [
        t for t, reward in zip(thoughts, paid.tolist(), strict=True) if reward != (0.5 if leak else 1.0)
    ] == []


def test_the_composite_reward_in_a_file(tmp_path):
    line = {
        "completion": f"{FIFTEEN} sixteen <think>The answer is A</think><answer>A</answer>",
        "answer": "A",
        "options": ["a", "b"],
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    penalties = ["--leak-penalty", "0.5", "--before-penalty", "0.3"]
    assert (
        cli.main(
            [
                "score",
                str(tmp_path / "in.jsonl"),
                "--mode",
                "paper",
                *penalties,
                "--out",
                str(tmp_path / "out.jsonl"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "out.jsonl").read_text())["reward"] == 0.2
    with pytest.raises(SystemExit):
        cli.main(["score", "in.jsonl", "--leak-penalty", "-1", "--out", "out.jsonl"])
