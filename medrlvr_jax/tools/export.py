"""`medrlvr export`: write a run's policy in the formats of Hugging Face transformers and PEFT."""

from pathlib import Path

import huggingface_hub
import jax

from medrlvr_jax.config.load import load
from medrlvr_jax.evaluation.evaluate import open_policy
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import read_json, reading, write_text
from medrlvr_jax.model import lora
from medrlvr_jax.model.export import save_adapter, save_params
from medrlvr_jax.model.families import resolve
from medrlvr_jax.runs.checkpoint import Which
from medrlvr_jax.tools.card import card


def export(
    run: Path,
    out: Path,
    step: Which,
    dtype: str | None,
    adapter: bool = False,
    push: str | None = None,
) -> None:
    """Write a run's policy with merged adapters as a Hugging Face directory, or only its adapters for PEFT.

    `dtype`: the dtype of the weights; None: the dtype in the base model's config.json, or float32 for
    adapters. `push`: the hub repository to upload the directory to. A new repository is private. Raises
    `ConfigError` if the adapters alone are not the whole result of the training.
    """
    n = len(jax.devices())
    sizes = ("sample.questions", "learn.minibatch", "learn.microbatch", "eval.batch")  # any mesh divides n
    settings = [f"mesh={{data: 1, fsdp: {n}}}", *(f"{size}={n}" for size in sizes)]
    parts, params, at = open_policy(run, settings, step)
    m = parts.config.model
    base = resolve(m.path)
    dtype = dtype or (None if adapter else stored_dtype(base))
    if adapter and m.init == "random":
        why = "model.init random: the base weights are in no directory"
        raise ConfigError(f"--adapter: {why}; remove --adapter")
    if adapter and m.vision != "freeze":
        why = f"model.vision {m.vision}: a part of the vision tower was trained, too"
        raise ConfigError(f"--adapter: {why}; remove --adapter")
    with jax.set_mesh(parts.mesh):
        if adapter:
            save_adapter(params, parts.cfg, m.path, out, dtype)
        else:
            merged, cfg = lora.merge(params, parts.cfg, dtype), lora.without_adapters(parts.cfg)
            save_params(merged, cfg, m.path, out, dtype, parts.tokenizer.stop_ids)
    if jax.process_index() == 0:
        trained = "float32" if m.lora else m.param_dtype
        if not adapter and (dtype or m.param_dtype) != trained:
            also = (
                " --adapter, which writes only the adapters, also does."
                if m.lora and m.vision == "freeze"
                else ""
            )
            print(f"The weights were rounded to {dtype or m.param_dtype}, which loses small changes.")
            print(f"--dtype float32 keeps them.{also}")
        config = load(run)
        text = card(run, config, at, base, push or str(out), adapter)
        write_text(out / "README.md", text)
        print(f"{out}: weights, tokenizer, and README.md, a model card for you to complete")
        if push:
            print(upload(out, push))


def stored_dtype(base: Path) -> str | None:
    """Return the dtype in a directory's config.json, or None if it is one that export cannot write."""
    config = read_json(base / "config.json", "repair it")
    dtype = config.get("torch_dtype") or config.get("dtype")
    return dtype if dtype in ("float32", "bfloat16") else None


def upload(folder: Path, name: str) -> str:
    """Upload a directory to the hub. Return its address, or raise `ConfigError` if that fails."""
    hub = huggingface_hub.HfApi()
    with reading(f"--push-to-hub: {name}", "log in with `hf auth login` as a user who may write there"):
        hub.create_repo(name, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=folder))
