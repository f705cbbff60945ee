"""The compiled programs of a run: what they are, the shapes they are called with, and their compilation before the first step.

`step_programs` describes a training step without any array: a training compiles from it what it is about to run, and `medrlvr plan` what
a machine that is not here would run. That both are what a step calls is held to by tests (test_plan.py, test_programs.py).
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from medrlvr_jax import build, sharding
from medrlvr_jax.build import Parts, Relay, make_relay
from medrlvr_jax.config.load import check_rl
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import attention, lora
from medrlvr_jax.rl.experience import experience_settings, make_experience
from medrlvr_jax.rl.learn import compile_learn, critic_objective, make_optimizer, policy_objective
from medrlvr_jax.rollout.assess import assess, assess_settings
from medrlvr_jax.rollout.program import Program, a_key, array, draw_program, relay_program
from medrlvr_jax.types import Assessment, Experience, Frozen, Rollout


@dataclass(frozen=True)
class Programs:
    """The jitted functions of a training that are its own; made once, since each new partial would compile anew."""

    relay: Relay
    learn_policy: Any
    learn_critic: Any  # None where there is no critic
    policy_tx: Any
    critic_tx: Any


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
    idle = (lambda *trees: ()) if c.learn.offload else (lambda *trees: trees)  # what waits in the host's memory meanwhile
    states = idle(policy.opt_state, critic and critic.opt_state)
    relay, values_net = programs.relay, critic and critic.params
    left = tuple(leaf for path, leaf in lora.flat(build.abstract_params(parts, parts.cfg)).items() if path not in relay.moved)
    draw = draw_program(parts, parts.sampler_cfg, c.sample, p, others=(relay.moved, values_net, idle(reference), states))
    prompts = draw.args[2]
    made = Experience(
        prompts=prompts,
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
            of_rows,
        ),
    ]
    if critic:
        args, others = (critic, base, made, key, None), (policy.params, idle(reference, policy.opt_state))
        out.append(Program("learn_critic", programs.learn_critic, args, {}, others, of_rows))
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
