"""Test with hostile input: `python tests/fuzz.py [MINUTES] [SEED]`. A finding is a traceback. The last line
counts the cases.

Lines of valid data, and completions of the reward corpus, are randomly cut, joined, repeated and changed, by
bytes and by tags.
- loaders   every format as JSONL, JSON and CSV: valid questions, or a DataError that names the file, and the
  line or record
- scorer    both rules compared with slow references, alone and in a batch; a line of `medrlvr score` is
  scored, or refused with file and line
- prompts   the text of a question in a chat template: no special tokens except the template's, or refused
- times     scoring four times the text takes at most ten times as long, for repeated random pieces
fuzz_guided.py fuzzes with coverage guidance where atheris can be installed.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import test_data  # noqa: E402
import test_rewards  # noqa: E402
import test_text  # noqa: E402

from medrlvr_jax.config.schema import PromptConfig, RewardConfig, SetConfig  # noqa: E402
from medrlvr_jax.data import load as data  # noqa: E402
from medrlvr_jax.data.question import DataError, Question  # noqa: E402
from medrlvr_jax.data.tokenizer import MESSAGE, wrap  # noqa: E402
from medrlvr_jax.rewards import score  # noqa: E402
from medrlvr_jax.tools.score_file import score_file  # noqa: E402

RECORDS = {
    "plain": test_data.PLAIN,
    "medqa": test_data.MEDQA,
    "mmlu_pro": test_data.PRO,
    "medmcqa": test_data.MCQA,
}
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\n",
    b"\r\n",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"null",
    b"NaN",
    b"1e999",
]
PIECES += [
    b"\\ud800",
    b"-0",
    b'"A"',
    b'"options"',
    b'"answer"',
    b"9" * 5000,
    b"[" * 2000,
    "é\u2028".encode(),
    b"\\u0000",
    b"<|im_end|>",
]
TAGS = [
    *test_rewards.TAGS,
    "C",
    "A",
    "C. Warfarin",
    " ",
    "\n",
    "\0",
    "x",
    "<",
    "</",
    "answer>",
    "\u00a0",
    "\ud800",
    "\x0b",
    "Ｃ",
    "<think",
]


def mutate(content: bytes, dice: random.Random) -> bytes:
    """Return the content with a few random changes of bytes."""
    out = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        i, j = sorted(dice.randint(0, len(out)) for _ in range(2))
        match dice.randrange(5):
            case 0:
                del out[i : min(j, i + dice.choice([1, 4, 10**6]))]
            case 1:
                out[i:i] = dice.choice(PIECES)
            case 2:
                out[i:i] = out[i : min(j, i + 200)]
            case 3 if i < len(out):
                out[i] ^= 1 << dice.randrange(8)
            case 4:
                out[i:j] = dice.choice(PIECES)
    return bytes(out)


def loaders(folder: Path, dice: random.Random) -> str:
    form, suffix = dice.choice(list(RECORDS)), dice.choice([".jsonl", ".json", ".csv"])
    record = json.dumps(RECORDS[form] | {"id": "a"}).encode()
    lines = b"\n".join([record, mutate(record, dice), record.replace(b'"a"', b'"b"')])
    if suffix == ".csv":
        lines = b"question,A,B,answer\n" + mutate(b'Which?,"one, two",three,A\n', dice)
    path = folder / f"fuzz{suffix}"
    path.write_bytes(lines if suffix != ".json" else mutate(b"[" + b",".join([record] * 2) + b"]", dice))
    try:
        found = data.load(SetConfig(path=str(path), format=dice.choice(["auto", form])))
    except DataError as e:
        assert path.name in str(e) and any(
            word in str(e) for word in ("line ", "record ", "it has no record")
        ), e
        return "refused"
    for q in found:
        assert (
            2 <= len(q.options) <= 10
            and 0 <= q.answer < len(q.options)
            and q.question.strip()
            and all(o.strip() for o in q.options)
        )
        str(q).encode()
    return "read"


def scorer(folder: Path, dice: random.Random) -> str:
    rows = []
    for row in dice.choices(test_rewards.CORPUS, k=dice.randint(1, 5)):
        pieces = dice.choices(TAGS, k=dice.randint(0, 8))
        at = dice.randint(0, len(row["completion"]))
        completion = (
            row["completion"][:at] + "".join(pieces) + row["completion"][at + dice.choice([0, 0, 1, 9]) :]
        )
        rows.append(row | {"completion": completion if dice.random() < 0.7 else "".join(pieces)})
    for mode, reference in test_rewards.REFERENCE.items():
        got = test_rewards.judge(mode, rows)
        assert got.answer.tolist() == [reference(r["completion"], r["options"]) for r in rows], rows
        assert got.reason.tolist() == [test_rewards.judge(mode, [r]).reason[0] for r in rows], rows
    line = json.dumps({k: rows[0][k] for k in ("completion", "answer", "options")}).encode()
    (folder / "in.jsonl").write_bytes(line + b"\n" + mutate(line, dice) + b"\n")
    try:
        (folder / "out.jsonl").unlink(missing_ok=True)
        score_file(folder / "in.jsonl", folder / "out.jsonl", RewardConfig())
    except DataError as e:
        assert "in.jsonl, line " in str(e), e
        return "refused"
    return "scored"


def prompts(folder: Path, dice: random.Random) -> str:
    tok = CHAT[dice.randrange(len(CHAT))]
    pieces = [
        *test_text.SPECIAL,
        "<|im",
        "_end|>",
        "[INST]",
        "[/INST]",
        "[/IN",
        "ST]",
        "user",
        "\n",
        " ",
        MESSAGE,
        "<answer>A</answer>",
        "\0",
        "é",
    ]
    content = "".join(dice.choices(pieces, k=dice.randint(1, 12))).strip() or "?"
    try:
        ids = test_text.encode_prompt(
            tok, Question("x", content, ("a", content), 0), PromptConfig(template="none", chat=True)
        )
    except DataError as e:
        assert "[/INST]" in content and "question x" in str(e), e
        return "refused"
    plain = test_text.encode_prompt(
        tok, Question("x", "?", ("a", "b"), 0), PromptConfig(template="none", chat=True)
    )
    assert test_text.special_inside(tok, ids) == test_text.special_inside(tok, plain) and content in tok.show(
        ids
    )
    return "encoded"


def times(folder: Path, dice: random.Random) -> str:
    bait = "".join(dice.choices(TAGS, k=dice.randint(1, 6)))
    mode = dice.choice(test_rewards.MODES)

    def seconds(size: int) -> float:
        completion, start = bait * (size // len(bait)) + dice.choice(TAGS), time.perf_counter()
        score([completion], ["C"], [test_rewards.FOUR], RewardConfig(mode=mode))
        return time.perf_counter() - start

    for _ in range(5):  # other processes may disturb a measurement
        if seconds(400_000) < 10 * seconds(100_000) + 0.05:
            return "linear"
    raise AssertionError((mode, bait))


CHAT = [
    wrap(test_text.make(merges=test_text.SPACED)),
    wrap(test_text.make(test_text.INST, merges=test_text.SPACED)),
]
TARGETS = [(loaders, 40), (scorer, 40), (prompts, 40), (times, 1)]  # with the number of cases per round


def main() -> None:
    minutes, seed = (int(word) for word in (sys.argv[1:] + ["1", "0"][len(sys.argv) - 1 :]))
    tally, start, rounds = Counter(), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        while time.monotonic() - start < 60 * minutes:
            for target, cases in TARGETS:
                for i in range(cases):
                    case = f"{seed}/{rounds}/{target.__name__}/{i}"
                    try:
                        tally[target.__name__, target(Path(name), random.Random(case))] += 1
                    except Exception:
                        print(f"case {case}", file=sys.stderr)
                        raise
            rounds += 1
    print(
        f"{minutes} minutes, seed {seed}: "
        + ", ".join(f"{target} {result} {n:,}" for (target, result), n in sorted(tally.items()))
    )


if __name__ == "__main__":
    main()
