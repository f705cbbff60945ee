"""Our vision towers compute what transformers computes, and so does the decoder with images in its prompt.

Against transformers itself where torch is installed, else (and as well) against its stored numbers. When a
change of transformers is meant: `python tests/make_vision.py`.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_vision import CONFIGS, GOLDEN, SIZES, make, pictures, reference

from medrlvr_jax import sharding
from medrlvr_jax.config.schema import MeshConfig
from medrlvr_jax.data import images
from medrlvr_jax.model import vision
from medrlvr_jax.model import weights as hf

TOLERANCE = 1e-5  # of the largest value


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return cache(lambda kind: make(tmp_path_factory.mktemp(kind), kind))


@cache
def load(path):
    """Configuration and tower of a directory."""
    cfg = hf.read_config(path)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    places = sharding.shardings(vision.abstract(cfg.vision), mesh, sharding.TRAIN)
    return cfg, hf.load_params(path, cfg, {"vision": places}, "float32")["vision"]


def grids(cfg):
    return [tuple(images.patches(image, cfg.vision)[1] for image in row) for row in pictures()]


def features(cfg, tower):
    """Of each image, one after another, as `reference` has them; and of each question, by its slots."""
    of_questions = grids(cfg)
    windows = max(images.windows_of(row, cfg.vision) for row in of_questions)
    arranged = images.arrange(pictures(), windows, cfg.vision)
    seen = jax.jit(lambda p, x: vision.tower(p, cfg.vision, x, jnp.float32))(tower, arranged)
    assert np.isfinite(seen).all()
    slots = (images.token_slots(row, cfg.vision) for row in of_questions)
    return np.concatenate([np.asarray(row)[place] for row, place in zip(seen, slots, strict=True)]), seen


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@cache
def live(path):
    pytest.importorskip("torch")
    return reference(path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_as_transformers_had_them(kind, directory):
    close(features(*load(directory(kind)))[0], np.load(GOLDEN)[f"{kind}.features"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_as_transformers_has_them(kind, directory):
    theirs = live(directory(kind))
    close(features(*load(directory(kind)))[0], theirs["features"])


FAULTS = {
    "windows in all layers": lambda v: replace(v, full_layers=()),
    "images in all layers": lambda v: replace(v, full_layers=(0, 1, 2, 3)),
    "other layers": lambda v: replace(v, full_layers=(0, 2)),
    "smaller windows": lambda v: replace(v, window=4),
    "another mean": lambda v: replace(v, mean=(0.5, 0.5, 0.5)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_show(fault, directory):
    cfg, tower = load(directory("qwen2_5_vl"))
    wrong = features(replace(cfg, vision=FAULTS[fault](cfg.vision)), tower)[0]
    assert np.abs(wrong - np.load(GOLDEN)["qwen2_5_vl.features"]).max() > 0.05


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_of_the_tower_matters(kind, directory):
    """So a forgotten one would fail the tests above."""
    cfg, tower = load(directory(kind))
    arranged = images.arrange([pictures()[2]], 4, cfg.vision)
    see = jax.jit(lambda p: vision.tower(p, cfg.vision, arranged, jnp.float32))
    usual, draw = np.asarray(see(tower)), np.random.RandomState(0)
    for name in [n for n, row in vision.PARAMETERS.items() if row.exists(cfg.vision)]:
        path = vision.path_of(name)
        branch = tower["layers"] if len(path) > 1 else tower
        changed = branch | {name: branch[name] * draw.uniform(0.5, 1.5, branch[name].shape)}
        moved = np.abs(np.asarray(see(tower | {"layers": changed} if len(path) > 1 else changed)) - usual)
        assert moved.max() > 1e-2, (name, moved.max())


def test_another_image_changes_nothing(directory):
    """An image's features do not depend on what else is in the question, in the batch or in empty slots."""
    cfg, tower = load(directory("qwen2_5_vl"))
    see = jax.jit(lambda x: vision.tower(tower, cfg.vision, x, jnp.float32))
    [both, *_] = pictures()
    together = np.asarray(see(images.arrange([both], 8, cfg.vision)))[0]
    alone = np.asarray(see(images.arrange([both[1:]], 8, cfg.vision)))[0]
    slots = images.token_slots(grids(cfg)[0], cfg.vision)
    n = images.patches(both[1], cfg.vision)[1].tokens
    close(alone[:n], together[slots[-n:]])
    assert len(SIZES[0]) == 2
