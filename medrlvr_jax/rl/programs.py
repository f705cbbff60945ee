"""The jitted functions of a training. `ahead.py` knows the arguments with which they are compiled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from medrlvr_jax import build
from medrlvr_jax.build import Parts
from medrlvr_jax.config.check import check_rl
from medrlvr_jax.model_rewards.answer_scores import PolicyReward
from medrlvr_jax.model_rewards.policy import make_policy_rewards
from medrlvr_jax.rl.experience import make_experience, select
from medrlvr_jax.rl.learn import compile_learn, critic_objective, make_optimizer, policy_objective
from medrlvr_jax.rollout.assess import assess
from medrlvr_jax.rollout.generate import generate
from medrlvr_jax.rollout.sync import WeightSync, make_weight_sync


@dataclass(frozen=True)
class Programs:
    """The jitted functions of a training. They are made once: a new partial would compile again."""

    sync_weights: WeightSync
    generate: Any
    select: Any
    assess: Any
    make_experience: Any
    learn_policy: Any
    learn_critic: Any  # None without a critic
    policy_tx: Any
    critic_tx: Any
    policy_rewards: Mapping[str, PolicyReward]  # by the component's name

    def wrapped(self, wrap: Callable[[str, Any], Any]) -> "Programs":
        """Return the same with `wrap(name, function)` in place of each function, to time or record calls."""
        names = ("generate", "select", "assess", "make_experience", "learn_policy", "learn_critic")
        functions = {name: getattr(self, name) for name in names}
        wrapped = {name: wrap(name, function) for name, function in functions.items() if function}
        of = lambda name, reward: reward._replace(program=wrap(name, reward.program))
        wrapped["policy_rewards"] = {name: of(name, reward) for name, reward in self.policy_rewards.items()}
        sync_weights = replace(self.sync_weights, program=wrap("sync_weights", self.sync_weights.program))
        return replace(self, sync_weights=sync_weights, **wrapped)


def make_programs(parts: Parts, steps: int) -> Programs:
    """Make the functions of a training of `steps` steps. Nothing is compiled yet.

    The schedules of learning rates end with the run. The policy's begins after the critic's warm-up.
    """
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
        select=select,
        assess=assess,
        make_experience=make_experience,
        learn_policy=learn_policy,
        learn_critic=learn_critic,
        policy_tx=policy_tx,
        critic_tx=critic_tx,
        policy_rewards=make_policy_rewards(parts),
    )
