"""Fuzz with coverage guidance by atheris: `python tests/fuzz_guided.py {scorer|loader} [-max_total_time=600]
[CORPUS_DIR]`.

It needs `pip install atheris`; the options are those of libFuzzer. It checks what fuzz.py checks; fuzz.py
mutates more kinds of input, but without guidance.
- scorer   the bytes as a completion (Latin-1 or UTF-8 text with lone surrogates): every mode compared with
  its slow reference
- loader   the bytes as a JSONL file of questions, with the format detected or given
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

RULE = ["medrlvr_jax.rewards.parse", "medrlvr_jax.rewards.graders"]
with atheris.instrument_imports(include=["medrlvr_jax.data", *RULE, "test_rewards"]):
    import test_rewards

    from medrlvr_jax.config.schema import SetConfig
    from medrlvr_jax.data import load as data
    from medrlvr_jax.data.question import DataError

import test_data  # noqa: E402

FORMATS = ["auto", "plain", "medqa", "mmlu_pro", "mmlu", "medmcqa", "pubmedqa"]
RECORDS = [test_data.PLAIN, test_data.MEDQA, test_data.PRO, test_data.MCQA]
FOLDER = tempfile.TemporaryDirectory()


def scorer(content: bytes) -> None:
    completion = content[1:].decode("latin-1" if content[:1] < b"\x80" else "utf-8", "surrogateescape")
    row = {"completion": completion, "options": test_rewards.FOUR, "answer": "C"}
    for mode, reference in test_rewards.REFERENCE.items():
        got = test_rewards.judge(
            mode, [row, row | {"completion": "<think>x</think><answer>C</answer>" + completion}, row]
        )
        assert got.answer[0] == got.answer[2] == reference(completion, row["options"]), (mode, completion)
        assert got.reason[0] == got.reason[2] == test_rewards.judge(mode, [row]).reason[0], (mode, completion)


def loader(content: bytes) -> None:
    path = Path(FOLDER.name) / "fuzz.jsonl"
    path.write_bytes(content[1:])
    try:
        found = data.load(
            SetConfig(path=str(path), format=FORMATS[content[0] % len(FORMATS)] if content else "auto")
        )
    except DataError as e:
        assert path.name in str(e) and any(
            word in str(e) for word in ("line ", "it has no record", "fit no format")
        ), e
        return
    for q in found:
        assert (
            2 <= len(q.options) <= 10
            and 0 <= q.answer < len(q.options)
            and q.question.strip()
            and all(o.strip() for o in q.options)
        )
        str(q).encode()


def main() -> None:
    name, *options = sys.argv[1:]
    seeds = Path(tempfile.mkdtemp())
    for i, row in enumerate(test_rewards.CORPUS if name == "scorer" else RECORDS):
        line = (
            row["completion"] if name == "scorer" else json.dumps(row) + "\n" + json.dumps(row | {"id": "b"})
        )
        (seeds / str(i)).write_bytes(b"\0" + line.encode("utf-8", "surrogatepass"))
    folders = [o for o in options if not o.startswith("-")] or [tempfile.mkdtemp()]
    flags = [o for o in options if o.startswith("-")]
    atheris.Setup(
        [sys.argv[0], "-len_control=0", *flags, *folders, str(seeds)],
        {"scorer": scorer, "loader": loader}[name],
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
