"""The verifiers of a run: on its own mesh (`MeshVerifier`), or on a server (`RemoteVerifier`).

All processes enter a sharded program together, with the same shapes and the same rows. So each sends the
prompts of the rows that it scores to all, and every process lays out the same batches: equal prompts once,
each at the least of a few widths that holds it, the last batch of a width filled up with its first rows.
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
from medrlvr_jax.build import Parts, read_model
from medrlvr_jax.config.reward import RewardConfig, VerifierConfig
from medrlvr_jax.config.schema import PromptConfig, SampleConfig
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import gather
from medrlvr_jax.model import decoder
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model_rewards import frozen, verifier
from medrlvr_jax.model_rewards.endpoint import Endpoint, Reply, api_key, yes_share
from medrlvr_jax.model_rewards.frozen import FrozenModel
from medrlvr_jax.model_rewards.verifier import LEAD, Verifier
from medrlvr_jax.rewards.components import list_components
from medrlvr_jax.rollout.generate import DrawSettings, generate
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.rollout.rollout import width
from medrlvr_jax.types import Array, Params, Prompts

WIDTHS = (0.25, 0.5, 1.0)  # shares of max_tokens at which a program is compiled
Row = tuple[int, ...]  # a prompt's tokens


@partial(jax.jit, static_argnames=("cfg", "verdicts"))
def yes_probability(params: Params, cfg: DecoderConfig, prompts: Prompts, verdicts: tuple[int, int]) -> Array:
    """float32 [N] on every device: after each prompt, the first of two tokens' probability among the two."""
    states, _ = decoder.forward(params, cfg, prompts)
    ids = jnp.array(verdicts)
    table = params["embed"][ids] if cfg.tied else params["head"][:, ids].T
    table = table.astype(cfg.execution.dtype)
    scores = jnp.einsum("ne,ve->nv", states[:, -1], table, preferred_element_type=jnp.float32)
    return sharding.constrain(jax.nn.sigmoid(scores[:, 0] - scores[:, 1]), None)


@partial(jax.jit, static_argnames="settings")
def greedy_reply(params: Params, prompts: Prompts, settings: DrawSettings) -> tuple[Array, Array]:
    """Tokens and mask [N, R], on every device: the most probable token at each place."""
    rollout = generate(params, prompts, jax.random.key(0), settings)
    tokens, mask = rollout.tokens[:, 0], rollout.mask[:, 0]
    return sharding.constrain(tokens, None, None), sharding.constrain(mask, None, None)


@dataclass(frozen=True, eq=False)
class MeshVerifier:
    """A verifier and how it is asked. Laid out first, its parameters as shapes; `loaded` fills it."""

    settings: VerifierConfig
    model: FrozenModel
    verdicts: tuple[int, int] = (0, 1)  # the tokens of Yes and No

    @property
    def widths(self) -> list[int]:
        """Columns of the prompts that programs are compiled for."""
        return sorted({width(max(1, int(self.settings.max_tokens * share))) for share in WIDTHS})

    @property
    def size(self) -> int:
        """Prompts of a batch."""
        return sharding.rows_that_split(self.model.mesh, self.settings.batch)

    def loaded(self) -> "MeshVerifier":
        """With its weights, which wait in the host's memory if offloaded."""
        model = frozen.load(self.model, self.settings.model)
        return dataclasses.replace(
            self, model=model.in_memory("pinned_host") if self.settings.offload else model
        )

    def programs(self, rows: int) -> list[Program]:
        """What `ask` will call, as shapes: of a verifier that is laid out. `rows`: the responses of a
        step; at most, all are asked about at full width.
        """
        shape = partial(jax.ShapeDtypeStruct, sharding=sharding.rows(self.model.mesh))
        ids, out = shape((self.size,), jnp.uint32), []
        for columns in self.widths:
            tokens, mask = (shape((self.size, columns), dtype) for dtype in (jnp.int32, jnp.bool_))
            function, args = self._call(self.model.params, Prompts(tokens, mask, ids))
            calls = -(-rows // self.size) if columns == self.widths[-1] else 0
            out.append(Program(f"verify {columns}", function, args, calls=calls))
        return out

    def ask(self, texts: Sequence[str]) -> list[verifier.Reply]:
        """The verifier's reply to each prompt of this process. All processes call it together."""
        s, tokenizer = self.settings, self.model.tokenizer
        rows: list[Row] = [tuple(row) for row in encode(tokenizer, texts, s.chat, s.score == "soft")]
        fit = [row for row in rows if len(row) <= self.widths[-1]]
        replies = self._replies(list(dict.fromkeys(map(tuple, chain.from_iterable(gather(fit))))))
        return [replies.get(row) for row in rows]

    def _replies(self, rows: Sequence[Row]) -> dict[Row, verifier.Reply]:
        """Of distinct prompts, the same ones in all processes."""
        by_width: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            by_width[next(columns for columns in self.widths if len(row) <= columns)].append(row)
        model = self.model.in_memory("device") if self.settings.offload else self.model
        batches: list[tuple[list[Row], Any]] = []
        with jax.set_mesh(model.mesh):
            for columns, members in sorted(by_width.items()):
                for start in range(0, len(members), self.size):
                    part = members[start : start + self.size]
                    function, args = self._call(model.params, self.placed(part, columns))
                    batches.append((part, function(*args)))
            read = [(part, self._read(jax.device_get(result))) for part, result in batches]
        return {row: reply for part, replies in read for row, reply in zip(part, replies, strict=False)}

    def _call(self, params: Params, prompts: Prompts) -> tuple[Any, tuple]:
        """The program for one batch, and its arguments."""
        s, model = self.settings, self.model
        if s.score == "soft":
            return yes_probability, (params, model.cfg, prompts, self.verdicts)
        asked = SampleConfig(questions=self.size, samples=1, max_new_tokens=s.max_new_tokens, temperature=0.0)
        ends = model.tokenizer.stop_ids, model.tokenizer.pad_id
        return greedy_reply, (params, prompts, DrawSettings(model.cfg, asked, *ends))

    def placed(self, rows: list[Row], columns: int) -> Prompts:
        """A batch of prompts on the mesh, filled up with its first ones; each process places its own."""
        held, _ = sharding.own_rows(self.size, self.model.mesh)
        taken = [list(rows[i % len(rows)]) for i in held]
        prompts = text.pad_prompts(
            taken, np.zeros(len(held), np.uint32), columns, self.model.tokenizer.pad_id
        )
        return sharding.place_rows(prompts, self.size, self.model.mesh)

    def _read(self, result: Any) -> list[verifier.Reply]:
        if self.settings.score == "soft":
            return result.tolist()
        texts = self.model.tokenizer.decode(*result)
        return [verifier.hard_reply(reply, self.settings.verdicts) for reply in texts]


def lay_out(
    settings: VerifierConfig, cfg: DecoderConfig, tokenizer: Any, mesh: jax.sharding.Mesh, field: str
) -> MeshVerifier:
    """A verifier without weights. `field`: the setting of its component, for `ConfigError`s.

    The sampler reads all weights for each token, so of a hard verifier they are whole along `fsdp`.
    """
    table = sharding.TRAIN if settings.score == "soft" else sharding.DECODE
    model = frozen.lay_out(cfg, tokenizer, mesh, settings.dtype, table, f"{field}.model")
    return MeshVerifier(settings, model)


def read(settings: VerifierConfig, mesh: jax.sharding.Mesh, field: str) -> MeshVerifier:
    """`lay_out` of the model that the settings name; all that can be refused before device work is."""
    cfg, tokenizer = read_model(settings.model, f"{field}.model")
    asked = lay_out(settings, cfg, tokenizer, mesh, field)
    needed = asked.widths[-1] + (settings.max_new_tokens if settings.score == "hard" else 0)
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
        return dataclasses.replace(asked, verdicts=verdict_tokens(tokenizer, settings.verdicts, field))
    return asked


@dataclass(frozen=True, eq=False)
class RemoteVerifier:
    """A verifier that a server runs."""

    settings: VerifierConfig
    endpoint: Endpoint

    def ask(self, texts: Sequence[str]) -> list[verifier.Reply]:
        """The verifier's reply to each prompt of this process; a str says why there is none."""
        soft = self.settings.score == "soft"
        prompts = [verifier.with_lead(prompt) for prompt in texts] if soft else texts
        replies = self.endpoint.complete(prompts, 1 if soft else self.settings.max_new_tokens, soft)
        return [reply if isinstance(reply, str) else self._read(reply) for reply in replies]

    def _read(self, reply: Reply) -> float | None:
        if self.settings.score == "soft":
            return yes_share(reply.first, self.settings.verdicts)
        return verifier.hard_reply(reply.text, self.settings.verdicts)


Prepared = Mapping[str, MeshVerifier | RemoteVerifier]  # the verifiers of a run by their components' names


def connect(settings: VerifierConfig, url: str, folder: Path, name: str) -> RemoteVerifier:
    """A server's verifier, asked whether it is there; its replies are kept under `folder`."""
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
    """The verifiers among the components of a reward, by the components' names."""
    terms = list_components(reward)
    return {term.name: term.settings for term in terms if isinstance(term.settings, VerifierConfig)}


def prepare(parts: Parts) -> Prepared:
    """The verifiers of a run, those on the mesh laid out; all that can be refused before device work is."""
    config, out = parts.config, {}
    for name, settings in sections(config.reward).items():
        field = f"reward.components.{name}"
        try:
            verifier.template_of(settings.prompt)
        except ValueError as e:
            raise ConfigError(f"{field}.prompt: {settings.prompt[:60]!r}: {e}") from None
        if settings.url is None:
            out[name] = read(settings, parts.mesh, field)
        else:
            out[name] = connect(settings, settings.url, Path(config.runs) / config.name / "verifier", name)
    return out


def start(parts: Parts, prepared: Prepared) -> dict[str, Verifier]:
    """The judges of the components, those on the mesh with their weights."""
    out = {}
    for name, asked in prepared.items():
        asked = asked.loaded() if isinstance(asked, MeshVerifier) else asked
        s = asked.settings
        soft = s.score == "soft" and not verifier.divides_by_spread(parts.config.advantage)
        standardise = soft if s.standardise is None else s.standardise
        out[name] = Verifier(name, s, asked.ask, parts.tokenizer.encode_untrusted, standardise)
    return out


def verdict_tokens(tokenizer: Tokenizer, verdicts: tuple[str, str], field: str) -> tuple[int, int]:
    """The tokens of the two verdicts; refused unless each is a token of its own behind the lead."""
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
    """Prompts as tokens. In a chat the lead of a soft verdict begins the assistant's turn."""
    frame = text.make_frame(tokenizer, PromptConfig(chat=chat))
    if not chat:
        shown = [verifier.with_lead(prompt) if soft else prompt for prompt in texts]
        return [frame.head + ids for ids in tokenizer.encode_untrusted(shown)]
    tail = frame.tail + (tokenizer.encode_untrusted([LEAD])[0] if soft else [])
    shown = [frame.before + prompt + frame.after for prompt in texts]
    return [frame.head + ids + tail for ids in tokenizer.encode_untrusted(shown)]
