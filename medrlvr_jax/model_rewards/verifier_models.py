"""The verifiers of a run: on its own mesh (`MeshVerifier`), or on a server (`RemoteVerifier`).

All processes enter a sharded program together, with the same shapes and the same rows. So each process sends
its prompts to all, and every process makes the same batches: equal prompts are one row, each prompt has the
least of a few widths that holds it, and the last batch of a width is filled up with its first rows.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medrlvr_jax import sharding
from medrlvr_jax.build import Parts, check_widths, read_model, shardings_of
from medrlvr_jax.config.reward import RewardConfig, VerifierConfig
from medrlvr_jax.config.schema import PromptConfig, SampleConfig
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import gather
from medrlvr_jax.model import decoder, spec, weights
from medrlvr_jax.model.architecture import DecoderConfig, Execution
from medrlvr_jax.model_rewards import verifier
from medrlvr_jax.model_rewards.endpoint import Completion, Endpoint, api_key, yes_share
from medrlvr_jax.model_rewards.verifier import LEAD, Reply, Verifier, append_lead
from medrlvr_jax.rewards.components import list_components
from medrlvr_jax.rollout.generate import DrawSettings, generate
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.rollout.rollout import width
from medrlvr_jax.types import Array, Params, Prompts

WIDTHS = (0.25, 0.5, 1.0)  # shares of max_tokens for which a program is compiled
Row = tuple[int, ...]  # a prompt's tokens


@partial(jax.jit, static_argnames=("cfg", "verdicts"))
def yes_probability(params: Params, cfg: DecoderConfig, prompts: Prompts, verdicts: tuple[int, int]) -> Array:
    """Return the first token's probability among two tokens behind each prompt, float32 [N], replicated."""
    states, _ = decoder.forward(params, cfg, prompts)
    ids = jnp.array(verdicts)
    table = params["embed"][ids] if cfg.tied else params["head"][:, ids].T
    table = table.astype(cfg.execution.dtype)
    logits = jnp.einsum("ne,ve->nv", states[:, -1], table, preferred_element_type=jnp.float32)
    return sharding.constrain(jax.nn.sigmoid(logits[:, 0] - logits[:, 1]), None)


@partial(jax.jit, static_argnames="settings")
def greedy_reply(params: Params, prompts: Prompts, settings: DrawSettings) -> tuple[Array, Array]:
    """Return the tokens and mask [N, R] of greedy replies, replicated."""
    rollout = generate(params, prompts, jax.random.key(0), settings)
    tokens, mask = rollout.tokens[:, 0], rollout.mask[:, 0]
    return sharding.constrain(tokens, None, None), sharding.constrain(mask, None, None)


@dataclass(frozen=True, eq=False)
class MeshVerifier:
    """A verifier on the run's mesh."""

    settings: VerifierConfig
    cfg: DecoderConfig
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    params: Params  # sharded over `mesh`; shapes (ShapeDtypeStructs) until `load`
    verdicts: tuple[int, int] = (0, 1)  # the tokens of Yes and No

    @property
    def widths(self) -> list[int]:
        """The numbers of columns for which a program is compiled."""
        return sorted({width(max(1, int(self.settings.max_tokens * share))) for share in WIDTHS})

    @property
    def size(self) -> int:
        """The number of prompts in a batch."""
        return sharding.round_up_rows(self.mesh, self.settings.batch)

    def load(self) -> "MeshVerifier":
        """Return it with its weights, which are in the host's memory with `offload`."""
        shardings = shardings_of(self.params)
        params = weights.load_params(self.settings.model, self.cfg, shardings, jnp.dtype(self.settings.dtype))
        if self.settings.offload:
            params = sharding.to_memory(params, "pinned_host")
        return dataclasses.replace(self, params=params)

    def programs(self, rows: int) -> list[Program]:
        """Return the programs that `ask` calls, before `load`.

        `rows` are the responses of a step. At most all of them are sent, each at full width.
        """
        shape = partial(jax.ShapeDtypeStruct, sharding=sharding.rows(self.mesh))
        ids, out = shape((self.size,), jnp.uint32), []
        for columns in self.widths:
            tokens, mask = (shape((self.size, columns), dtype) for dtype in (jnp.int32, jnp.bool_))
            function, args = self._call(self.params, Prompts(tokens, mask, ids))
            calls = -(-rows // self.size) if columns == self.widths[-1] else 0
            out.append(Program(f"verify {columns}", function, args, calls=calls))
        return out

    def ask(self, texts: Sequence[str]) -> list[Reply]:
        """Return the reply to each prompt of this process. All processes call it together.

        A prompt that is longer than `max_tokens` has no verdict.
        """
        s = self.settings
        rows: list[Row] = [tuple(row) for row in encode(self.tokenizer, texts, s.chat, s.score == "soft")]
        short = [row for row in rows if len(row) <= self.widths[-1]]
        replies = self._replies(list(dict.fromkeys(map(tuple, chain.from_iterable(gather(short))))))
        return [replies.get(row) for row in rows]

    def _replies(self, rows: Sequence[Row]) -> dict[Row, Reply]:
        """Return the replies to distinct prompts, which are the same in all processes."""
        by_width: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            by_width[next(columns for columns in self.widths if len(row) <= columns)].append(row)
        params = sharding.to_memory(self.params, "device") if self.settings.offload else self.params
        batches: list[tuple[list[Row], Any]] = []
        with jax.set_mesh(self.mesh):
            for columns, members in sorted(by_width.items()):
                for start in range(0, len(members), self.size):
                    part = members[start : start + self.size]
                    function, args = self._call(params, self.place(part, columns))
                    batches.append((part, function(*args)))
            read = [(part, self._read(jax.device_get(result))) for part, result in batches]
        return {row: reply for part, replies in read for row, reply in zip(part, replies, strict=False)}

    def _call(self, params: Params, prompts: Prompts) -> tuple[Any, tuple]:
        """Return the program for one batch, and its arguments."""
        s = self.settings
        if s.score == "soft":
            return yes_probability, (params, self.cfg, prompts, self.verdicts)
        sample = SampleConfig(
            questions=self.size, samples=1, max_new_tokens=s.max_new_tokens, temperature=0.0
        )
        ends = self.tokenizer.stop_ids, self.tokenizer.pad_id
        return greedy_reply, (params, prompts, DrawSettings(self.cfg, sample, *ends))

    def place(self, rows: list[Row], columns: int) -> Prompts:
        """Return a batch on the mesh, filled up with its first prompts. Each process places its own rows."""
        local, _ = sharding.local_rows(self.size, self.mesh)
        tokens = [list(rows[i % len(rows)]) for i in local]
        prompts = text.pad_prompts(tokens, np.zeros(len(local), np.uint32), columns, self.tokenizer.pad_id)
        return sharding.place_rows(prompts, self.size, self.mesh)

    def _read(self, result: Any) -> list[Reply]:
        if self.settings.score == "soft":
            return result.tolist()
        texts = self.tokenizer.decode(*result)
        return [verifier.read_verdict(reply, self.settings.verdicts) for reply in texts]


def lay_out(
    settings: VerifierConfig, cfg: DecoderConfig, tokenizer: Any, mesh: jax.sharding.Mesh, field: str
) -> MeshVerifier:
    """Return a verifier without weights. `field` is the setting of its component, for `ConfigError`s.

    A hard verifier is sampled from: the sampler reads all weights for each token, so that they are not split
    over `fsdp`.
    """
    platform = mesh.devices.flat[0].platform
    execution = Execution(
        dtype=jnp.dtype(settings.dtype).type,
        remat="none",
        splash=platform == "tpu",
        unroll=platform != "tpu",
        narrow=platform == "cpu",
    )
    try:
        check_widths(cfg, mesh)
    except ConfigError as e:
        raise ConfigError(f"{field}.model: {e}; or take another model") from None
    cfg = dataclasses.replace(cfg, execution=execution)
    table = sharding.TRAIN if settings.score == "soft" else sharding.DECODE
    params = sharding.abstract_arrays(spec.abstract(cfg), mesh, table, jnp.dtype(settings.dtype))
    return MeshVerifier(settings, cfg, tokenizer, mesh, params)


def read(settings: VerifierConfig, mesh: jax.sharding.Mesh, field: str) -> MeshVerifier:
    """Lay out the model that the settings name. Raises `ConfigError` for all that is wrong with it."""
    cfg, tokenizer = read_model(settings.model, f"{field}.model")
    out = lay_out(settings, cfg, tokenizer, mesh, field)
    needed = out.widths[-1] + (settings.max_new_tokens if settings.score == "hard" else 0)
    if cfg.max_positions is not None and needed > cfg.max_positions:
        raise ConfigError(
            f"{field}.max_tokens: {settings.max_tokens}: rows of {needed} tokens are beyond "
            f"max_position_embeddings = {cfg.max_positions} of {settings.model}; lower it"
        )
    try:
        encode(tokenizer, [""], settings.chat, soft=True)
    except ConfigError as e:
        raise ConfigError(str(e).replace("prompt.chat", f"{field}.chat")) from None
    if settings.score == "soft":
        return dataclasses.replace(out, verdicts=verdict_tokens(tokenizer, settings.verdicts, field))
    return out


@dataclass(frozen=True, eq=False)
class RemoteVerifier:
    """A verifier on a server."""

    settings: VerifierConfig
    endpoint: Endpoint

    def ask(self, texts: Sequence[str]) -> list[Reply]:
        """Return the reply to each prompt of this process."""
        soft = self.settings.score == "soft"
        prompts = list(map(append_lead, texts)) if soft else texts
        replies = self.endpoint.complete(prompts, 1 if soft else self.settings.max_new_tokens, soft)
        return [reply if isinstance(reply, str) else self._read(reply) for reply in replies]

    def _read(self, reply: Completion) -> Reply:
        if self.settings.score == "soft":
            return yes_share(reply.first, self.settings.verdicts)
        return verifier.read_verdict(reply.text, self.settings.verdicts)


Verifiers = Mapping[str, MeshVerifier | RemoteVerifier]  # of a run, by their components' names


def connect(settings: VerifierConfig, url: str, folder: Path, name: str) -> RemoteVerifier:
    """Return a server's verifier. Raises `ConfigError` if the server cannot be used.

    Its replies are kept under `folder`.
    """
    field = f"reward.components.{name}"
    if settings.chat and settings.score == "soft":
        raise ConfigError(
            f"{field}.score: soft needs the server's /completions; set chat to false, or take hard"
        )
    limits = {"deadline": settings.deadline, "retries": settings.retries, "concurrency": settings.concurrency}
    key, process = api_key(settings.key, field), jax.process_index()
    endpoint = Endpoint(
        url, settings.model, settings.chat, key, **limits, folder=folder / name, process=process
    )
    endpoint.check(field)
    return RemoteVerifier(settings, endpoint)


def sections(reward: RewardConfig) -> dict[str, VerifierConfig]:
    """Return the settings of the verifiers among the components, by the components' names."""
    listed = list_components(reward)
    return {c.name: c.settings for c in listed if isinstance(c.settings, VerifierConfig)}


def prepare(parts: Parts) -> Verifiers:
    """Return the verifiers of a run, not loaded. Raises `ConfigError` for all that is wrong with them."""
    config, out = parts.config, {}
    for name, settings in sections(config.reward).items():
        field = f"reward.components.{name}"
        try:
            verifier.find_template(settings.prompt)
        except ValueError as e:
            raise ConfigError(f"{field}.prompt: {settings.prompt[:60]!r}: {e}") from None
        if settings.url is None:
            out[name] = read(settings, parts.mesh, field)
        else:
            out[name] = connect(settings, settings.url, Path(config.runs) / config.name / "verifier", name)
    return out


def load(parts: Parts, verifiers: Verifiers) -> dict[str, Verifier]:
    """Return the reward functions of the components. Verifiers on the mesh load their weights."""
    out = {}
    for name, prepared in verifiers.items():
        loaded = prepared.load() if isinstance(prepared, MeshVerifier) else prepared
        s = loaded.settings
        standardise = s.standardise
        if standardise is None:
            standardise = s.score == "soft" and not verifier.divides_by_spread(parts.config.advantage)
        out[name] = Verifier(name, s, loaded.ask, parts.tokenizer.encode_untrusted, standardise)
    return out


def verdict_tokens(tokenizer: Tokenizer, verdicts: tuple[str, str], field: str) -> tuple[int, int]:
    """Return the two verdicts' tokens. Raises `ConfigError` unless each is one token behind the lead."""
    lead, *both = tokenizer.encode_untrusted([LEAD, *(LEAD + verdict for verdict in verdicts)])
    wrong = [v for v, row in zip(verdicts, both, strict=True) if row[:-1] != lead]
    if wrong or both[0] == both[1]:
        problem = f"{wrong[0]!r} is not one token" if wrong else "the two are the same token"
        raise ConfigError(
            f"{field}.verdicts: {list(verdicts)}: {problem} behind {LEAD!r} in the verifier's tokenizer; "
            "name two that differ, such as ['1', '0'], or set score to hard"
        )
    return both[0][-1], both[1][-1]


def encode(tokenizer: Tokenizer, texts: Sequence[str], chat: bool, soft: bool) -> list[list[int]]:
    """Return the tokens of prompts. In a chat, the lead of a soft verdict begins the assistant's turn."""
    frame = text.make_frame(tokenizer, PromptConfig(chat=chat))
    if not chat:
        prompts = [append_lead(prompt) if soft else prompt for prompt in texts]
        return [frame.head + ids for ids in tokenizer.encode_untrusted(prompts)]
    tail = frame.tail + (tokenizer.encode_untrusted([LEAD])[0] if soft else [])
    prompts = [frame.before + prompt + frame.after for prompt in texts]
    return [frame.head + ids + tail for ids in tokenizer.encode_untrusted(prompts)]
