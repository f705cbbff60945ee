"""Errors while reading a user's file name the file, the cause and a remedy; errors of this package keep their
traceback.
"""

import json
import os
import subprocess
import sys

import pytest

from medrlvr_jax.config import load as configs
from medrlvr_jax.data.question import DataError
from medrlvr_jax.host import files, processes
from medrlvr_jax.host.errors import ConfigError

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


class PanicException(BaseException):
    """pyo3 raises such an exception if Rust code panics."""


@pytest.mark.parametrize(
    "raised", [Exception("bare"), MemoryError("bare"), RecursionError("bare"), PanicException("bare")]
)
def test_any_exception_of_a_library_becomes_an_error_with_the_file(tmp_path, raised):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError) as e, files.reading(tmp_path / "a.json", "save it again", DataError):
        raise raised
    assert str(e.value) == f"{tmp_path}/a.json: cannot be read: {type(raised).__name__}: bare; save it again"
    assert e.value.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(1), ConfigError("in words already")])
def test_exits_and_our_own_errors_pass_unchanged(raised):
    with pytest.raises(type(raised)) as e, files.reading("a.json", "save it again"):
        raise raised
    assert e.value is raised


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        (LFS, "git lfs pull"),
        ("\n<!DOCTYPE html><html><body>404</body></html>", "it is a web page"),
        ('{"a": 1', "JSONDecodeError: Expecting ',' delimiter"),
        ("[1]", "it has a list where a JSON object is required"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_json(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as e:
        files.read_json(tmp_path / "config.json")
    assert words in str(e.value) and str(e.value).startswith(f"{tmp_path}/config.json: ")
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert files.read_json(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_encode_a_character_ends_no_command(tmp_path, encoding):
    (tmp_path / "β.yaml").write_text("name: a\nname: b\n")
    env = os.environ | {"PYTHONIOENCODING": encoding}
    for args, status in ((["train", "--help"], 0), (["--help"], 0), (["train", str(tmp_path / "β.yaml")], 2)):
        done = subprocess.run([sys.executable, "-m", "medrlvr_jax", *args], env=env, capture_output=True)
        assert done.returncode == status and b"UnicodeEncodeError" not in done.stderr, done.stderr
    assert rb"\u03b2.yaml: name: given 2 times" in done.stderr


def test_an_address_without_a_port(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host0")
    with pytest.raises(
        ConfigError, match=r"JAX_COORDINATOR_ADDRESS: host0: the port .* is missing; write it as host:port"
    ):
        processes.initialize()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "name: a\nreward: {}\nreward: {}\nsteps: 1\nreward: {}",
            "reward: given 3 times, on lines 2, 3 and 5",
        ),
        ("learn: {policy: {lr: 1.0e-3, lr: 1.0e-4}}", "lr: given 2 times, on lines 1 and 1"),
        (
            "arms:\n  - {seed: 1}\n  - {seed: 1, other: 2,\n     seed: 3}",
            "seed: given 2 times, on lines 3 and 4",
        ),
    ],
)
def test_a_key_given_twice_is_refused_at_any_depth(tmp_path, text, complaint):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/twice.yaml: {complaint}; keep only one$"):
        configs.load(tmp_path / "twice.yaml")
    with pytest.raises(ConfigError, match=r"reward\.mode=.*: a: given 2 times"):
        configs.override({}, "reward.mode={a: 1, a: 2}")


def test_recursive_yaml_is_checked_once():
    assert configs.parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, b: 2}\n", "f", "") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 2},
    }
    loop = configs.parse_yaml("a: &x [*x]", "f", "")
    assert loop["a"][0] is loop["a"]


@pytest.mark.parametrize(
    "read",
    [
        lambda file: configs.load(file),
        lambda file: __import__("medrlvr_jax.studies.arms").studies.arms.read(file, []),
        lambda file: __import__("medrlvr_jax.runs.log").runs.log.check_same(file, None),
        lambda file: __import__("medrlvr_jax.report.page").report.page.read_run(file.parent),
    ],
    ids=["train", "reproduce", "resume", "report"],
)
def test_every_reader_of_yaml_refuses_repeated_keys(tmp_path, read):
    (tmp_path / "config.yaml").write_text("name: a\nname: b\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"config\.yaml: name: given 2 times, on lines 1 and 2"):
        read(tmp_path / "config.yaml")


def test_settings_that_are_texts_stay_texts(tmp_path):
    tree = {"steps": 1, "model": {"path": "embedded"}, "data": {"path": "embedded:train"}}
    tree["learn"] = {"policy": {"lr": 1e-4}, "critic": {"lr": 1e-3}}
    for item in (
        "name=007",
        "data.split=no",
        "runs=2024-01-01",
        "data.subset=null",
        "eval.sets.mine.path=1e400",
        "data.limit=3",
    ):
        configs.override(tree, item)
    c = configs.from_tree(tree)
    assert (c.name, c.data.split, c.runs, c.data.subset, c.data.limit) == ("007", "no", "2024-01-01", None, 3)
    assert c.eval.sets["mine"].path == "1e400"
    with pytest.raises(
        ConfigError, match=r"name: 2024 \(YAML reads int\) must be a string; put it in quotes"
    ):
        configs.from_tree(tree | {"name": 2024})
