"""The model card of an export, and its upload to a fake hub."""

import json

import pytest
import yaml
from test_log import config

from medrlvr_jax.config import load as configs
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.tools import card, export

COUNTS = {"n": 40, "questions": 40, "correct": 10, "format_ok": 40}


@pytest.fixture
def run(tmp_path):
    c = config(tmp_path, reward={"mode": "strict", "correct": 2.0})
    folder, base = tmp_path / "run", tmp_path / "base"
    folder.mkdir()
    base.mkdir()
    (folder / "config.yaml").write_text(f"# medrlvr train\n{configs.dump(c)}")
    before = {f"eval.dev.{k}": v for k, v in (COUNTS | {"correct": 4}).items()}
    after = {f"eval.dev.{k}": v for k, v in COUNTS.items()}
    rows = [{"step": 0, **before}, {"step": 3, "reward": 1.0, **after}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"data": {"train": {"n": 2000, "sha256": "abc"}}}))
    return folder, c, base


def test_the_card_has_training_and_evaluation(run):
    folder, c, base = run
    text = card.card(folder, c, 3, base, "me/model", adapter=False)
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers" and "license" not in yaml.safe_load(head)
    assert "`embedded` after 3 steps of reinforcement learning" in body and "2,000 rows, sha256 `abc`" in body
    assert "| dev | 40 | 10.0 % (4.0–23.1) | 25.0 % (14.2–40.2) |" in body and "correct: 2.0" in body
    assert "**Not for clinical use.**" in body and "Not checked" in body and "look it up" in body
    assert 'model="me/model"' in body and "{question}" in body
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (folder / "eval-3").mkdir()
    (folder / "eval-3" / "eval.json").write_text(json.dumps({"eval": {"test": COUNTS}}))
    text = card.card(folder, c, 3, base, "me/model", adapter=True)
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "apache-2.0" and "(`apache-2.0`)" in text
    assert "| test, by `medrlvr eval` | 40 | – | 25.0 % (14.2–40.2) |" in text and "Load it with PEFT" in text


def test_the_default_dtype_is_that_of_the_base_model(tmp_path):
    for said, dtype in (({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float16"}, None), ({}, None)):
        (tmp_path / "config.json").write_text(json.dumps(said))
        assert export.stored_dtype(tmp_path) == dtype


def test_an_export_is_uploaded_to_a_private_repository(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            if name == "other/model":
                raise OSError("403 Forbidden")
            calls.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            return f"https://hub.example/{repo_id}"

    monkeypatch.setattr(export.huggingface_hub, "HfApi", Hub)
    (tmp_path / "README.md").touch()
    assert export.upload(tmp_path, "me/model") == "https://hub.example/me/model"
    assert calls == [("me/model", True, True), ("me/model", ["README.md"])]
    with pytest.raises(ConfigError, match=r"--push-to-hub: other/model: .*403 Forbidden.*hf auth login"):
        export.upload(tmp_path, "other/model")
