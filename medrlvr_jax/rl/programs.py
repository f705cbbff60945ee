"""The compiled programs of a run: what they are, the shapes they are called with, and their compilation before the first step.

`step_programs` describes a training step without any array: a training compiles from it what it is about to run, and `medrlvr plan` what
a machine that is not here would run. That both are what a step calls is held to by tests (test_plan.py, test_programs.py).
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medrlvr_jax import build, sharding
from medrlvr_jax.build import Parts, Relay, make_relay
from medrlvr_jax.config.load import check_rl
from medrlvr_jax.config.schema import SampleConfig
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import attention, lora
from medrlvr_jax.model.decoder import DecoderConfig
from medrlvr_jax.plan import flops
from medrlvr_jax.rl.experience import assess, assess_settings, experience_settings, make_experience
from medrlvr_jax.rl.learn import compile_learn, critic_objective, make_optimizer, policy_objective
from medrlvr_jax.rollout.generate import generate
from medrlvr_jax.types import Assessment, Experience, Frozen, Prompts, Rollout


@dataclass(frozen=True)
class Programs:
    """The jitted functions of a training that are its own; made once, since each new partial would compile anew."""

    relay: Relay
    learn_policy: Any
    learn_critic: Any  # None where there is no critic
    policy_tx: Any
    critic_tx: Any


class Program(NamedTuple):
    """A jitted function, its arguments as shapes, and what else is in memory meanwhile."""

    name: str
    function: Any
    args: tuple
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    others: tuple = ()  # trees of shapes that live on while it runs and are not among its arguments
    useful: float = 0.0  # FLOPs without recomputation, over all devices
    visited: Mapping[str, float] = MappingProxyType({})  # see `attention.visited`


def make_programs(parts: Parts, steps: int) -> Programs:
    """Nothing is compiled or allocated yet. Schedules end with the run: while the critic warms up, the policy's stands still."""
    config = parts.config
    check_rl(config)
    policy_tx = make_optimizer(config.learn.policy, build.updates_in(config, steps - config.learn.critic_warmup))
    placed = build.places(build.abstract_learner(parts, parts.cfg, policy_tx))
    learn_policy = compile_learn(config, policy_objective(config, parts.cfg), policy_tx, placed)
    critic_tx, learn_critic = None, None
    if config.learn.critic is not None:
        critic_tx = make_optimizer(config.learn.critic, build.updates_in(config, steps))
        placed = build.places(build.abstract_learner(parts, parts.critic_cfg, critic_tx))
        learn_critic = compile_learn(config, critic_objective(config, parts.critic_cfg), critic_tx, placed)
    return Programs(make_relay(parts, parts.sampler_cfg), learn_policy, learn_critic, policy_tx, critic_tx)


def array(parts: Parts, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """Of a batch: its leading axis over the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(parts.mesh))


def a_key(parts: Parts) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=sharding.replicated(parts.mesh))


def draw_program(parts: Parts, cfg: DecoderConfig, sample: SampleConfig, width: int, name: str = "generate", **kept: Any) -> Program:
    """`generate` as `experience` calls it: prompts of `width` columns, a sampler `cfg`."""
    q, g, r = sample.questions, sample.samples, sample.max_new_tokens
    prompts = Prompts(array(parts, jnp.int32, q, width), array(parts, jnp.bool_, q, width), array(parts, jnp.uint32, q))
    tokenizer = parts.tokenizer
    args = build.abstract_decode(parts, cfg), cfg, prompts, a_key(parts), sample, tokenizer.stop_ids, tokenizer.pad_id
    visited = attention.visited(width, 0, width) if cfg.splash else {}
    return Program(name, generate, args, {"entropies": False}, useful=flops.generate_flops(cfg, q, width, g, r), visited=visited, **kept)


def relay_program(relay: Relay, **kept: Any) -> list[Program]:
    """The relay's, where it copies anything."""
    return [Program("relay", relay.program, (relay.moved,), **kept)] if relay.moved else []


def step_programs(parts: Parts, programs: Programs, width: int) -> list[Program]:
    """All programs of one training step in their order, with arguments as the step gives them; prompts have `width` columns."""
    c, mesh, p = parts.config, parts.mesh, width
    q, g, r = c.sample.questions, c.sample.samples, c.sample.max_new_tokens

    def column(dtype=jnp.float32):
        return array(parts, dtype, q, g, r)

    policy, base = build.abstract_learner(parts, parts.cfg, programs.policy_tx), build.abstract_base(parts)
    reference = None
    if c.kl.coef > 0:
        reference = {} if parts.cfg.lora else build.abstract_params(parts, parts.cfg)
    frozen = Frozen(base, reference)
    critic = build.abstract_learner(parts, parts.critic_cfg, programs.critic_tx) if programs.critic_tx else None
    values = critic and column()
    truncated = c.sample.top_k or c.sample.top_p < 1 or c.sample.min_new_tokens or c.sample.temperature == 0
    rollout = Rollout(column(jnp.int32), column(jnp.bool_), column(), column() if truncated else None)
    assessment = Assessment(column(), column(), None if reference is None else column(), values)
    coef, key = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh)), a_key(parts)
    of_rows = attention.visited(p, g, r) if parts.cfg.splash else {}
    one = flops.forward_flops(parts.cfg, q, p, g, r)
    of_critic = flops.forward_flops(parts.critic_cfg, q, p, g, r) if critic else 0.0
    idle = (lambda *trees: ()) if c.learn.offload else (lambda *trees: trees)  # what waits in the host's memory meanwhile
    states = idle(policy.opt_state, critic and critic.opt_state)
    relay, values_net = programs.relay, critic and critic.params
    left = tuple(leaf for path, leaf in lora.flat(build.abstract_params(parts, parts.cfg)).items() if path not in relay.moved)
    draw = draw_program(parts, parts.sampler_cfg, c.sample, p, others=(relay.moved, values_net, idle(reference), states))
    prompts = draw.args[2]
    made = Experience(
        prompts=prompts.tokens,
        prompt_mask=prompts.mask,
        tokens=rollout.tokens,
        mask=rollout.mask,
        logprobs=column(),
        ref_logprobs=assessment.ref_logprobs,
        advantages=column(),
        values=values,
        returns=values,
        sampler_weights=None if c.loss.sampler_cap is None else column(),
    )
    out = relay_program(relay, others=(left, values_net, idle(reference), states))
    out += [
        draw,  # what is not moved is the sampler's own
        Program(
            "assess",
            assess,
            (frozen, policy.params, values_net, prompts, rollout),
            assess_settings(parts),
            (states,),
            one * (1 if reference is None else 2) + of_critic,
            of_rows,
        ),
        Program(
            "make_experience",
            make_experience,
            (prompts, rollout, assessment, array(parts, jnp.float32, q, g), coef),
            experience_settings(parts),
            (base, policy.params, values_net, idle(reference), states),
        ),
        Program(
            "learn_policy",
            programs.learn_policy,
            (policy, base, made, key, coef),
            {},
            (values_net, idle(reference, critic and critic.opt_state)),
            3 * c.learn.epochs * one,
            of_rows,
        ),
    ]
    if critic:
        args, others = (critic, base, made, key, None), (policy.params, idle(reference, policy.opt_state))
        out.append(Program("learn_critic", programs.learn_critic, args, {}, others, 3 * c.learn.epochs * of_critic, of_rows))
    return out


def compile_ahead(programs: Sequence[Program], parts: Parts, progress: Callable[[str, int, int], None]) -> str:
    """Compile all; the calls that follow find them in JAX's own cache. Returns what it took, in words.

    As many at a time as there are pairs of cores: XLA keeps about two busy with one, and a gigabyte of the host's memory. A program that
    does not fit is known before anything runs. All processes begin them in one order, so that none waits for what another has not begun
    (GPUs' tuning is shared). `progress`: (what, done, of how many).
    """
    began, took = time.monotonic(), {}

    def one(program: Program) -> None:
        start = time.monotonic()
        with jax.set_mesh(parts.mesh):
            program.function.lower(*program.args, **program.kwargs).compile()
        took[program.name] = time.monotonic() - start

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        waiting = {pool.submit(one, program): program.name for program in programs}
        for done, future in enumerate(as_completed(waiting), 1):
            try:
                future.result()
            except jax.errors.JaxRuntimeError as e:
                pool.shutdown(wait=False, cancel_futures=True)  # those not begun: the reason is not kept waiting for them
                if "RESOURCE_EXHAUSTED" not in str(e):
                    raise
                said, remedy = str(e).split("\n")[0][:300], "`medrlvr plan CONFIG --topology …` says by how much, and what would help"
                raise ConfigError(f"{waiting[future]} does not fit this machine: {said}; {remedy}") from None
            progress("compiling", done, len(programs))
    slowest = max(took, key=lambda name: took[name])
    return f"{len(programs)} programs compiled in {time.monotonic() - began:.0f} s; longest was {slowest}, {took[slowest]:.0f} s"
