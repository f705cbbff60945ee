"""The compiled programs of a training: what they are, and their compilation before the first step.

Which arguments they get is recorded by taking a step with shapes for arrays (`step.step_programs`): a
training compiles from that what it is about to run, and `medrlvr plan` what a machine that is not here would
run.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import jax

from medrlvr_jax import build
from medrlvr_jax.build import Parts
from medrlvr_jax.config.check import check_rl
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model_rewards.ask import PolicyReward
from medrlvr_jax.model_rewards.policy import make_policy_rewards
from medrlvr_jax.rl.experience import make_experience
from medrlvr_jax.rl.learn import compile_learn, critic_objective, make_optimizer, policy_objective
from medrlvr_jax.rollout.assess import assess
from medrlvr_jax.rollout.generate import generate
from medrlvr_jax.rollout.program import Program
from medrlvr_jax.rollout.sync import WeightSync, make_weight_sync


@dataclass(frozen=True)
class Programs:
    """The jitted functions of a training; made once, since each new partial would compile anew."""

    sync_weights: WeightSync
    generate: Any
    assess: Any
    make_experience: Any
    learn_policy: Any
    learn_critic: Any  # None where there is no critic
    policy_tx: Any
    critic_tx: Any
    policy_rewards: Mapping[str, PolicyReward]  # by the name of the component

    def wrapped(self, wrap: Callable[[str, Any], Any]) -> "Programs":
        """The same with `wrap(name, function)` in place of each function: to time calls, or record them."""
        names = ("generate", "assess", "make_experience", "learn_policy", "learn_critic")
        functions = {name: getattr(self, name) for name in names}
        wrapped = {name: wrap(name, function) for name, function in functions.items() if function}
        of = lambda name, reward: reward._replace(program=wrap(name, reward.program))
        wrapped["policy_rewards"] = {name: of(name, reward) for name, reward in self.policy_rewards.items()}
        sync_weights = replace(self.sync_weights, program=wrap("sync_weights", self.sync_weights.program))
        return replace(self, sync_weights=sync_weights, **wrapped)


def make_programs(parts: Parts, steps: int) -> Programs:
    """Nothing is compiled yet. Schedules end with the run; while the critic warms up, the policy's waits."""
    config = parts.config
    check_rl(config)
    updates = build.count_updates(config, steps - config.learn.critic_warmup)
    policy_tx = make_optimizer(config.learn.policy, updates)
    placed = build.shardings_of(build.abstract_learner(parts, parts.cfg, policy_tx))
    learn_policy = compile_learn(config, policy_objective(config, parts.cfg), policy_tx, placed)
    critic_tx, learn_critic = None, None
    if config.learn.critic is not None:
        critic_tx = make_optimizer(config.learn.critic, build.count_updates(config, steps))
        placed = build.shardings_of(build.abstract_learner(parts, parts.critic_cfg, critic_tx))
        learn_critic = compile_learn(config, critic_objective(config, parts.critic_cfg), critic_tx, placed)
    return Programs(
        sync_weights=make_weight_sync(parts, parts.sampler_cfg),
        generate=generate,
        assess=assess,
        make_experience=make_experience,
        learn_policy=learn_policy,
        learn_critic=learn_critic,
        policy_tx=policy_tx,
        critic_tx=critic_tx,
        policy_rewards=make_policy_rewards(parts),
    )


def compile_ahead(
    programs: Sequence[Program], parts: Parts, progress: Callable[[str, int, int, str], None]
) -> str:
    """Compile all; the calls that follow find them in JAX's own cache. Returns what it took, in words.

    As many at a time as there are pairs of cores: XLA keeps about two busy with one, and a gigabyte of the
    host's memory. A program that does not fit is known before anything runs. All processes begin them in one
    order, so that none waits for what another has not begun (GPUs' tuning is shared). `progress`: (what,
    done, of how many, waiting for what).
    """
    began, took = time.monotonic(), {}
    started: list[str] = []

    def report() -> None:
        awaited = [name for name in started if name not in took]
        progress("compiling", len(took), len(programs), ", ".join(awaited))

    def compile_one(program: Program) -> None:
        start = time.monotonic()
        started.append(program.name)
        report()
        with jax.set_mesh(parts.mesh):
            program.function.lower(*program.args, **program.kwargs).compile()
        took[program.name] = time.monotonic() - start

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        waiting = {pool.submit(compile_one, program): program.name for program in programs}
        for future in as_completed(waiting):
            try:
                future.result()
            except jax.errors.JaxRuntimeError as e:
                # those not begun: the reason is not kept waiting for them
                pool.shutdown(wait=False, cancel_futures=True)
                if "RESOURCE_EXHAUSTED" not in str(e):
                    raise
                problem = f"{waiting[future]} does not fit this machine: {str(e).splitlines()[0][:300]}"
                remedy = "`medrlvr plan CONFIG --topology …` says by how much, and what would help"
                raise ConfigError(f"{problem}; {remedy}") from None
            report()
    seconds, name = max((seconds, name) for name, seconds in took.items())
    longest = f"longest was {name}, {seconds:.0f} s"
    return f"{len(programs)} programs compiled in {time.monotonic() - began:.0f} s; {longest}"
