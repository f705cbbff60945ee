"""Checkpoints are restored bitwise on any mesh. Damage and full disks are noticed, and the last undamaged
checkpoint remains.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from medrlvr_jax.config.schema import CheckpointConfig
from medrlvr_jax.runs import checkpoint, seal
from medrlvr_jax.runs.checkpoint import CheckpointError, Checkpoints, restore_params
from medrlvr_jax.types import Learner, TrainState

META = {
    "config": {"name": "test", "lr": 1e-3, "absent": None, "checkpoint": {"best": None}},
    "versions": {"git": None},
}
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))


def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def make_state(mesh, seed=0, width=32, critic=False):
    """Fill a state by numpy, which needs no compilation."""
    random = np.random.default_rng(seed)

    def fill(leaf):
        spec = PartitionSpec(None, "fsdp", "tensor") if leaf.ndim == 3 else PartitionSpec()
        return jax.device_put(
            random.normal(size=leaf.shape, scale=9).astype(leaf.dtype), NamedSharding(mesh, spec)
        )

    def learner():
        params = {
            "layers": {
                "w": jax.ShapeDtypeStruct((4, 64, width), jnp.float32),
                "b": jax.ShapeDtypeStruct((width,), jnp.bfloat16),
            }
        }
        return Learner(params, jax.eval_shape(TX.init, params))

    kl_coef = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.tree.map(fill, TrainState(learner(), learner() if critic else None, kl_coef))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(folder, *steps, config=None, **kwargs):
    """Save a checkpoint for each of `steps`, with the step as the state's seed. Return the folder."""
    checkpoints = Checkpoints(folder, config or CheckpointConfig(keep=9), META)
    for step in steps:
        checkpoints.save(step, make_state(mesh_of(2, 2, 2), seed=step, **kwargs))
    checkpoints.close()
    return folder


@pytest.mark.parametrize("critic", [False, True])
def test_restored_states_are_bitwise_equal_on_any_mesh(tmp_path, critic):
    state = make_state(mesh_of(2, 2, 2), seed=20, critic=critic)
    checkpoints = Checkpoints(saved(tmp_path, 20, critic=critic), CheckpointConfig(), META)
    for shape in ((2, 2, 2), (1, 8, 1), (8, 1, 1)):
        target = abstract(make_state(mesh_of(*shape), critic=critic))
        back, step = checkpoints.restore(target)
        assert step == 20
        assert_same(back, state)
        assert jax.tree.leaves(jax.tree.map(lambda x, t: x.sharding == t.sharding, back, target)) == [
            True
        ] * len(jax.tree.leaves(back))


def test_a_checkpoint_with_the_retired_step_counter_is_read(tmp_path):
    state = make_state(mesh_of(2, 2, 2), critic=True)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), META)
    checkpoints.save(7, vars(state) | {"step": jnp.int32(7)})
    back, _ = checkpoints.restore(abstract(state))
    assert_same(back, state)
    checkpoints.save(8, vars(state) | {"steps": jnp.int32(7)})
    with pytest.raises(CheckpointError, match=r"steps is int32\[\] in the checkpoint and absent here"):
        checkpoints.restore(abstract(state))


def test_the_newest_checkpoint_replaces_a_new_state(tmp_path):
    fresh = make_state(mesh_of(2, 2, 2))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), META)
    assert checkpoints.restore(fresh) == (fresh, 0)
    checkpoints.save(3, make_state(mesh_of(2, 2, 2), seed=3))
    back, done = checkpoints.restore(fresh)
    assert done == 3 and fresh.kl_coef.is_deleted()
    assert_same(back, make_state(mesh_of(2, 2, 2), seed=3))
    checkpoints.save(3, back)  # a step that is there is left alone
    checkpoints.close()


def test_training_may_overwrite_the_state_while_it_is_being_written(tmp_path):
    """On CPU a host copy can be a view. Donating the state must not change the data that are being written."""
    state = make_state(mesh_of(2, 2, 2), seed=1, width=512)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), META)
    expected = jax.tree.map(lambda x: np.array(x), state)
    for _ in range(2):
        checkpoints.save(1, state)
        state = step(state)
    back, _ = checkpoints.restore(abstract(state))
    assert_same(jax.tree.map(np.asarray, back), expected)


def test_the_newest_and_the_best_are_kept_also_after_a_restart(tmp_path):
    config = CheckpointConfig(keep=2, best="eval.dev.accuracy")
    state = make_state(mesh_of(2, 2, 2))
    for scores in ({1: 0.1, 2: 0.9, 3: None}, {4: 0.2, 5: float("nan"), 6: 0.3}):
        checkpoints = Checkpoints(tmp_path, config, META)
        for step, score in scores.items():
            checkpoints.save(
                step, state, None if score is None else {"eval.dev.accuracy": score, "reward": 1.0}
            )
        checkpoints.close()
    assert checkpoint.saved_steps(tmp_path) == [2, 5, 6]
    params = abstract(state).policy.params
    assert restore_params(tmp_path, params, "best")[1] == 2
    assert restore_params(tmp_path, params)[1] == 6


def test_parameters_are_restored_also_with_another_dtype(tmp_path):
    saved(tmp_path, 4, critic=True)
    mesh = mesh_of(8, 1, 1)
    shapes = abstract(make_state(mesh)).policy.params
    half = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=s.sharding), shapes)
    params, step = restore_params(tmp_path, half, 4)
    assert step == 4
    assert_same(
        params,
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(mesh, seed=4, critic=True).policy.params),
    )
    meta = tmp_path / "4" / "meta" / "metadata"
    assert json.loads(meta.read_text()) == {**META, "step": 4}
    with pytest.raises(CheckpointError, match=r"checkpoint 5 cannot be used: the saved steps are \[4\]"):
        restore_params(tmp_path, half, 5)
    with pytest.raises(CheckpointError, match=r"no checkpoint has a metric of checkpoint\.best"):
        restore_params(tmp_path, half, "best")


def test_another_model_is_refused_by_the_first_leaf_that_differs(tmp_path):
    checkpoints = Checkpoints(saved(tmp_path, 1), CheckpointConfig(), META)
    wider, with_critic = make_state(mesh_of(2, 2, 2), width=64), make_state(mesh_of(2, 2, 2), critic=True)
    with pytest.raises(
        CheckpointError,
        match=r"policy\.params\.layers\.b is bfloat16\[32\] in the checkpoint and bfloat16\[64\] here",
    ):
        checkpoints.restore(abstract(wider))
    with pytest.raises(
        CheckpointError,
        match=r"critic\.params\.layers\.b is absent in the checkpoint and bfloat16\[32\] here",
    ):
        checkpoints.restore(abstract(with_critic))
    with pytest.raises(CheckpointError, match=r"b is \[32\] in the checkpoint and \[64\] here"):
        restore_params(tmp_path, abstract(wider).policy.params)
    other = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding),
        abstract(make_state(mesh_of(2, 2, 2))),
    )
    with pytest.raises(
        CheckpointError, match=r"b is bfloat16\[32\] in the checkpoint and float32\[32\] here"
    ):
        checkpoints.restore(other)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "flip": (flip, "has changed since it was written"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "were written"),
    "gone": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize(
    ("what", "how"),
    [
        *(("state/ocdbt.process_0/d/*", how) for how in DAMAGES),
        ("state/_METADATA", "flip"),
        ("meta/metadata", "gone"),
        ("digests.json", "cut"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path, what, how):
    saved(tmp_path, 1, 2)
    act, reason = DAMAGES[how]
    act(max((tmp_path / "2").glob(what), key=lambda p: p.stat().st_size))
    params = abstract(make_state(mesh_of(2, 2, 2))).policy.params
    assert restore_params(tmp_path, params)[1] == 1  # a reader goes round it, and touches nothing
    with pytest.raises(CheckpointError, match="checkpoint 2 cannot be used"):
        restore_params(tmp_path, params, 2)
    notices = []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), META, notices.append)
    back, step = checkpoints.restore(abstract(make_state(mesh_of(2, 2, 2))))
    assert step == 1
    assert_same(back, make_state(mesh_of(2, 2, 2), seed=1))
    [notice] = notices
    assert "2.damaged" in notice and (reason in notice or what == "digests.json")
    checkpoints.save(2, back)  # and the step can be saved anew
    checkpoints.close()
    assert checkpoint.saved_steps(tmp_path) == [1, 2] and seal.find_damage(tmp_path / "2") is None


CUTS = {  # what becomes of a file's bytes; None: it is deleted
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "first bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "last bit": lambda data: data[:-1] + bytes([data[-1] ^ 0x80]),
    "middle zeroed": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]
    ),
    "deleted": None,
}


def test_any_damage_to_any_file_is_found_and_reported(tmp_path):
    """Each file is damaged in eight ways. The newest undamaged checkpoint is then the previous one."""
    saved(tmp_path, 1, 2)
    # Orbax's own notes: nothing is restored from them
    unread = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    files = [p for p in (tmp_path / "2").rglob("*") if p.is_file() and p.name not in unread]
    cases = 0
    for path in files:
        data = path.read_bytes()
        for how, cut in CUTS.items():
            if not data and how not in ("longer", "deleted"):
                continue  # there is nothing in it to damage
            path.unlink() if cut is None else path.write_bytes(cut(data))
            wrong = seal.find_damage(tmp_path / "2")
            # its last line break: the seal still says all
            whole = path.name == seal.SEAL and how == "a byte short"
            if path.name == seal.SEAL:  # damage within it may make another file look damaged
                assert (wrong is None) == whole, (how, wrong)
            else:
                assert wrong and wrong.startswith(str(path.relative_to(tmp_path / "2"))), (path, how, wrong)
            assert checkpoint._choose(tmp_path, None) == (2 if whole else 1)
            path.write_bytes(data)
            cases += 1
    for name in unread:
        (tmp_path / "2" / name).write_bytes(b"\xff")
    assert cases >= 50 and checkpoint._choose(tmp_path, None) == 2
    assert restore_params(tmp_path, abstract(make_state(mesh_of(2, 2, 2))).policy.params)[1] == 2


def test_removed_checkpoints_are_noticed(tmp_path):
    """The folders of all steps were removed, for example by a clean-up. Starting over would erase the logs."""
    folder = saved(tmp_path / "checkpoints", 1)
    shutil.rmtree(folder / "1")
    with pytest.raises(
        CheckpointError,
        match=r"no undamaged checkpoint is left, although some were saved; put one back, .* or remove .*",
    ):
        Checkpoints(folder, CheckpointConfig(), META).restore(make_state(mesh_of(2, 2, 2)))


def test_a_run_does_not_start_over_if_all_checkpoints_are_damaged(tmp_path):
    saved(tmp_path, 1)
    flip(tmp_path / "1" / "meta" / "metadata")
    for _ in range(2):
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(), META, lambda text: None)
        with pytest.raises(CheckpointError, match=r"no undamaged checkpoint is left, only 1\.damaged"):
            checkpoints.restore(abstract(make_state(mesh_of(2, 2, 2))))


# TensorStore's, as it gives up
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_an_error_at_the_next_call_and_leaves_the_last_checkpoint(tmp_path):
    state = make_state(mesh_of(2, 2, 2), width=512)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1), META)
    checkpoints.save(1, make_state(mesh_of(2, 2, 2), seed=1, width=512))
    checkpoints.wait()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(
            CheckpointError,
            match=r"checkpoint of step 2 could not be written; the newest complete one is step 1",
        ):
            checkpoints.save(2, state)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1), META)
    back, step = checkpoints.restore(abstract(state))
    assert step == 1
    assert_same(back, make_state(mesh_of(2, 2, 2), seed=1, width=512))


def test_check_raises_a_failure_without_waiting(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), META)
    monkeypatch.setattr(seal, "write_json", fail)
    checkpoints.save(1, make_state(mesh_of(2, 2, 2)))
    with pytest.raises(
        CheckpointError,
        match=r"step 1 could not be written; there is no earlier one.*\[Errno 28\] No space left on device",
    ):
        for _ in range(10_000):
            checkpoints.check()
            signal.sigtimedwait([], 0.01)
    assert checkpoint.saved_steps(tmp_path) == []


KILLED = """
import os, sys
from pathlib import Path
import conftest
from test_checkpoint import META, CheckpointConfig, Checkpoints, make_state, mesh_of, seal
write = seal.write_json
def die(path, tree):
    if path.parent.name.startswith("2"):
        os.kill(os.getpid(), 9)
    write(path, tree)
seal.write_json = die
checkpoints = Checkpoints(Path(sys.argv[1]), CheckpointConfig(keep=1), META)
for step in (1, 2):
    checkpoints.save(step, make_state(mesh_of(2, 2, 2), seed=step))
checkpoints.wait()
"""


def test_a_kill_before_the_rename_keeps_the_previous_checkpoint(tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env)
    assert run.returncode == -signal.SIGKILL
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1), META)
    back, step = checkpoints.restore(abstract(make_state(mesh_of(2, 2, 2))))
    assert step == 1
    assert_same(back, make_state(mesh_of(2, 2, 2), seed=1))
    checkpoints.save(2, back)
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]
