"""Measure the probability rewards of given thoughts, and the accuracy of the answers after them.

    python tests/planted_hacks.py MODEL [QUESTIONS]

MODEL is `embedded` or a directory. Each question of the embedded world gets four thoughts: its own reasoning,
that of another question, a copy of its options, and no reasoning. The table has one row per kind of thought:
the mean reward for four settings of `probability` (all with `format: 0`), and the share of right answers if
the most probable letter is the answer.
"""

import sys

import jax
import numpy as np

from medrlvr_jax import build
from medrlvr_jax.config import load as configs
from medrlvr_jax.data import load as data
from medrlvr_jax.data.question import LETTERS
from medrlvr_jax.evaluation import probe
from medrlvr_jax.host import tables
from medrlvr_jax.model_rewards import policy, probability
from medrlvr_jax.rl.experience import place_scored
from medrlvr_jax.rollout.rollout import encode, place_prompts, score_rollout
from medrlvr_jax.sharding import place_rows
from medrlvr_jax.types import Rollout

SETTINGS = {
    "text, mean": {"format": 0.0},
    "text, mean, no baseline": {"format": 0.0, "baseline": False},
    "text, product": {"format": 0.0, "score": "product"},
    "letter": {"format": 0.0, "of": "letter"},
}


def main(model: str = "embedded", questions: str = "64") -> None:
    n = int(questions)
    tree = {
        "name": "planted",
        "steps": 1,
        "model": {"path": model, "remat": "none"},
        "data": {"path": "embedded:train", "limit": n},
        "prompt": {"template": "none" if model == "embedded" else "think"},
        "sample": {"questions": n, "samples": 4, "max_new_tokens": 64 if model == "embedded" else 160},
        "reward": [
            {"kind": "probability", "name": name, "max_tokens": 8} | s for name, s in SETTINGS.items()
        ],
        "advantage": {"estimator": "group"},
        "learn": {"minibatch": n, "microbatch": 1 if model != "embedded" else n, "policy": {"lr": 1e-6}},
        "eval": {"batch": n if model == "embedded" else 1},
    }
    for part in tree["reward"]:
        part["name"] = part["name"].replace(", ", "-").replace(" ", "_")
    parts = build.build(configs.from_tree(tree))
    asked = data.load(parts.config.data)
    encoded = encode(parts.tokenizer, asked, parts.config)
    thoughts = {
        "its own reasoning": [q.rationale or "" for q in asked],
        "another's reasoning": [asked[(i + n // 2) % n].rationale or "" for i in range(n)],
        "its options copied": [" ".join(q.lettered_options) for q in asked],
        "none": ["guess."] * n,
    }
    length = parts.config.sample.max_new_tokens
    tokens = np.full((n, len(thoughts), length), parts.tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for g, of_kind in enumerate(thoughts.values()):
        rows = parts.tokenizer.encode_targets([f"<think>{t}</think>\n<answer>A</answer>" for t in of_kind])
        for i, row in enumerate(rows):
            tokens[i, g, : len(row)], mask[i, g, : len(row)] = row, True
    with jax.set_mesh(parts.mesh):
        params, index = build.load_params(parts, parts.cfg), np.arange(n)
        placed = place_rows((tokens, mask), n, parts.mesh)
        rollout = Rollout(*placed, placed[0], None)
        prompts = place_prompts(params, parts, encoded, index)
        scored = score_rollout(parts, encoded, index, rollout)
        rewards, quiet = policy.make_policy_rewards(parts), lambda *_: None
        columns = []
        for (_, reward), section in zip(rewards.items(), parts.config.reward.components, strict=True):
            if reward.baseline is not None:
                start = probability.start_scores(parts, section, ({}, params), encoded, quiet)
                reward.baseline.update(start)
            request = place_scored(reward.make_request(scored), scored, n, parts)
            columns.append(np.asarray(reward.program({}, params, prompts, rollout, request)).mean(0))
        bare = probe.before_response(parts, encoded)
        kinds = [(i, f"<think>{t[i]}</think>\n<answer>") for t in thoughts.values() for i in range(n)]
        scored = probe.letter_logprobs(parts, params, bare, kinds, quiet)
        best = [LETTERS[int(np.argmax(scored[kind][0]))] for kind in kinds]
    right = np.array(best).reshape(len(thoughts), n) == np.array([q.reference for q in asked])
    table = [
        [kind, *(f"{column[g]:.4f}" for column in columns), f"{100 * right[g].mean():.0f} %"]
        for g, kind in enumerate(thoughts)
    ]
    print(tables.plain(("thought", *SETTINGS, "right answers"), table))


if __name__ == "__main__":
    main(*sys.argv[1:])
