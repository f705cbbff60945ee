"""`medrlvr export`: write a run's policy in the formats of Hugging Face transformers and PEFT."""

from pathlib import Path
from typing import Literal

import jax

from medrlvr_jax.evaluation.evaluate import open_source
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import lora
from medrlvr_jax.model.export import save_adapter, save_params


def export(
    run: Path, out: Path, step: int | Literal["best"] | None, dtype: str | None, adapter: bool = False
) -> None:
    """Write a run's policy, adapters merged, as a Hugging Face directory; or its adapters, like PEFT."""
    n = len(jax.devices())
    sizes = ("sample.questions", "learn.minibatch", "learn.microbatch", "eval.batch")  # n divides them all
    settings = [f"mesh={{data: 1, fsdp: {n}}}", *(f"{size}={n}" for size in sizes)]
    parts, params, _ = open_source(run, settings, step)
    m = parts.config.model
    if adapter and m.init == "random":
        why = "model.init random: no directory holds its base weights"
        raise ConfigError(f"--adapter: {why}; leave --adapter out")
    with jax.set_mesh(parts.mesh):
        if adapter:
            save_adapter(params, parts.cfg, m.path, out, dtype)
        else:
            merged, cfg = lora.merge(params, parts.cfg, dtype), lora.off(parts.cfg)
            save_params(merged, cfg, m.path, out, dtype, parts.tokenizer.stop_ids)
    if jax.process_index() == 0:
        if m.lora and not adapter and (dtype or m.param_dtype) == "bfloat16":
            print("the sums of matrices and adapters are rounded to bfloat16, which loses small adapters;")
            print("--dtype float32 keeps them, as does --adapter, which writes the adapters alone")
        print(out)
