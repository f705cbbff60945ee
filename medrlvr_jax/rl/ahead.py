"""The programs of a training step, known and compiled before the first step.

`step_programs` takes a step with shapes in place of arrays and records which programs are called, with which
arguments. A training compiles these before it begins, and `medrlvr plan` compiles them for a machine that is
not here.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp

from medrlvr_jax import build, sharding
from medrlvr_jax.build import Parts
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import lora
from medrlvr_jax.model.spec import VISION
from medrlvr_jax.model_rewards import verifier_models
from medrlvr_jax.model_rewards.policy import needs_grey_images
from medrlvr_jax.rewards.components import Component, list_components
from medrlvr_jax.rl.experience import columns
from medrlvr_jax.rl.programs import Programs
from medrlvr_jax.rl.step import Batch, Graded, Training, five_parts
from medrlvr_jax.rollout.program import Program, Recorder, a_key, abstract_prompts, array
from medrlvr_jax.rollout.see import see_program
from medrlvr_jax.types import Frozen, Params, Rollout, TrainState


def step_programs(
    parts: Parts,
    programs: Programs,
    width: int,
    components: tuple[Component, ...] | None = None,
    windows: int = 0,
    verifiers: verifier_models.Verifiers | None = None,
) -> list[Program]:
    """Return the programs of a training step in the order of their calls.

    Prompts have `width` columns and their images `windows` windows. `components` of the reward are by
    default those of the settings. `verifiers`: the models that grade, laid out on the mesh.
    """
    components = list_components(parts.config.reward) if components is None else components
    frozen, state = build.abstract_frozen(parts), abstract_state(parts, programs)
    graders = [v for v in (verifiers or {}).values() if isinstance(v, verifier_models.MeshVerifier)]
    tower = abstract_tower(parts, frozen, state) if windows else None
    on_device = resident(parts, frozen, state), [v.params for v in graders if not v.settings.offload]
    if parts.cfg.execution.tower == "freeze":  # else it is among the policy's parameters
        on_device += (tower,)
    recorder, config = Recorder(parts.mesh, on_device), parts.config
    # What is offloaded comes to the device before a program is called, so the programs know nothing of it.
    on_chip = dataclasses.replace(config, learn=dataclasses.replace(config.learn, offload=False))
    training = Training(
        dataclasses.replace(parts, config=on_chip), programs.wrapped(recorder.of), frozen, components
    )
    with jax.set_mesh(parts.mesh):
        batch = abstract_batch(parts, programs, width, windows, components)
        if tower:
            seen = see_program(parts, config.sample.questions, windows, "see", tower)
            recorder.add(seen._replace(calls=1 + needs_grey_images(config.reward)))

        def grade(rollout: Rollout) -> Graded:
            rows = config.sample.questions * config.sample.samples
            for program in chain.from_iterable(v.programs(rows) for v in graders):
                recorder.add(program)
            return batch.grade(rollout)

        least_spread = state.kl_coef if config.advantage.spread else None
        five_parts(training, state, lambda _: batch._replace(grade=grade), 1, a_key(parts), least_spread)
        if config.sample.max_batches > 1:
            [experience] = [p for p in recorder.programs if p.name == "make_experience"]
            drawn, settings = experience.args[0], experience.kwargs["config"]
            for pool in ((drawn,), (drawn, drawn)):
                training.programs.select(pool, config=settings)
    return recorder.programs


def abstract_state(parts: Parts, programs: Programs) -> TrainState:
    """Return the state of a training as shapes."""
    policy, critic = build.abstract_learner(parts, parts.cfg, programs.policy_tx), None
    if programs.critic_tx:
        critic = build.abstract_learner(parts, parts.critic_cfg, programs.critic_tx)
    replicated = sharding.replicated(parts.mesh)
    return TrainState(policy, critic, jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated))


def abstract_tower(parts: Parts, frozen: Frozen, state: TrainState) -> Params:
    """Return the vision tower's parameters as shapes, frozen or among the policy's."""
    if parts.cfg.execution.tower == "freeze":
        return build.abstract_tower(parts)
    return lora.join(frozen.base, state.policy.params)[VISION]


def resident(parts: Parts, frozen: Frozen, state: TrainState) -> Any:
    """Return what stays in the device's memory during a whole step, as a tree of shapes."""
    policy, critic = state.policy, state.critic
    params = policy.params, critic and critic.params, frozen.base
    if parts.config.learn.offload:
        return params
    return params, policy.opt_state, critic and critic.opt_state, frozen.reference


def abstract_batch(
    parts: Parts, programs: Programs, width: int, windows: int, components: tuple[Component, ...]
) -> Batch:
    """Return a batch as shapes; its `grade` returns what the host sends to the device, as shapes."""
    config = parts.config
    questions, samples = config.sample.questions, config.sample.samples
    graded = columns([c for c in components if not c.on_device], config.advantage)
    rewards = array(parts, jnp.float32, questions, samples, len(graded))
    requests = {name: reward.shapes for name, reward in programs.policy_rewards.items()}
    requests = jax.tree.map(lambda x: array(parts, x.dtype, *x.shape), requests)
    prompts = abstract_prompts(parts, questions, width, windows, needs_grey_images(config.reward))
    places = array(parts, jnp.int32, questions) if config.sample.max_batches > 1 else None
    return Batch(prompts, a_key(parts), lambda _: Graded(rewards, requests, None), places)


def compile_ahead(
    programs: Sequence[Program], parts: Parts, progress: Callable[[str, int, int, str], None]
) -> str:
    """Compile all programs, so that later calls find them in JAX's cache. Return a message with the time.

    One program is compiled for each two cores: XLA uses about two cores and a gigabyte of the host's memory
    for one. A program that does not fit into memory is found before anything runs. All processes begin the
    programs in the same order, because GPU processes share their tuning and wait for each other. `progress`
    is called with (what, done, of how many, names of the programs in work).
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
                # Programs that have not begun would delay this error.
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
