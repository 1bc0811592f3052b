import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.training import checkpoint
from moe_jax.training.checkpoint import Checkpointer, CheckpointError, fingerprints


def _state(seed: int = 0):
    key = jax.random.key(seed)
    params = {
        "w": jax.random.normal(key, (16, 24)),
        "half": jax.random.normal(key, (8, 3), jnp.bfloat16),
        "none": jnp.zeros((0, 4)),
    }
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "rest": {"bias": jnp.arange(-4, 4, dtype=jnp.int8), "mask": jnp.arange(5) % 2 == 0},
        "rng": key,
        "keys": jax.random.split(key, 3),
        "step": jnp.int32(seed),
    }


def _assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _sharded(tree, mesh):
    def struct(leaf):
        spec = PartitionSpec("x") if leaf.ndim and leaf.shape[0] % 8 == 0 and leaf.size else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(struct, tree)


def _save(directory, *steps, **options):
    with Checkpointer(directory, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, _state(step), {"seen": step})


def _chunks(folder: Path) -> list[Path]:
    """Files that hold array data, the largest first."""
    return sorted((f for f in folder.rglob("d/*") if f.is_file()), key=lambda f: -f.stat().st_size)


def _truncate(folder: Path):
    for file in _chunks(folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _delete(folder: Path):
    for file in _chunks(folder):
        file.unlink()


def _zero_fill(folder: Path):
    for file in _chunks(folder):
        file.write_bytes(bytes(file.stat().st_size))


def _flip_one_bit(folder: Path):
    file = _chunks(folder)[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _break_manifest(folder: Path):
    file = folder / "manifest" / "metadata"
    file.write_text(file.read_text().replace("seen", "sean"))


def _empty(folder: Path):
    for file in folder.rglob("*"):
        if file.is_file():
            file.unlink()


# Orbax closes an event loop that its reads still want to report to.
ignore_late_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DAMAGES = [_truncate, _delete, _zero_fill, _flip_one_bit, _break_manifest, _empty]


def test_round_trip_is_bit_exact(tmp_path):
    state = _state(3)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(state) is None
        checkpointer.save(3, state, {"data": {"index": 5}, "text": "é"})
        restored = checkpointer.restore(jax.eval_shape(lambda: _state(0)))
    assert restored is not None
    assert (restored.step, restored.extra) == (3, {"data": {"index": 5}, "text": "é"})
    _assert_equal(restored.state, state)
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored.state["params"]))


def test_nnx_state_round_trips(tmp_path):
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        restored = checkpointer.restore(jax.tree.map(jnp.zeros_like, state))
    assert restored is not None
    _assert_equal(restored.state, state)


def test_restores_on_another_number_of_devices(tmp_path):
    mesh, state = jax.make_mesh((8,), ("x",)), _state(1)
    struct_8 = _sharded(state, mesh)
    state_8 = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, struct_8))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_8, {})
        on_1 = checkpointer.restore(state)
        assert on_1 is not None
        _assert_equal(on_1.state, state)
        assert on_1.state["params"]["w"].devices() == {jax.devices()[0]}
        checkpointer.save(2, on_1.state, {})
        for like in (struct_8, state_8):
            on_8 = checkpointer.restore(like)
            assert on_8 is not None and on_8.step == 2
            _assert_equal(on_8.state, state)
            assert on_8.state["params"]["w"].sharding == struct_8["params"]["w"].sharding
            assert len(on_8.state["keys"].devices()) == 8


def test_partial_restore_reads_only_what_is_asked_for(tmp_path):
    _save(tmp_path, 1)
    like = {"params": _state(0)["params"]}
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(like, partial=True)
        assert restored is not None
        _assert_equal(restored.state, {"params": _state(1)["params"]})
        only_extra = checkpointer.restore({}, partial=True)
        assert only_extra is not None and only_extra.extra == {"seen": 1}
        with pytest.raises(CheckpointError, match="params/more: checkpoint absent"):
            checkpointer.restore({"params": {**like["params"], "more": jnp.zeros(2)}}, partial=True)
        with pytest.raises(CheckpointError, match="another config"):
            checkpointer.restore(like)


def test_restores_the_step_that_is_asked_for_or_none(tmp_path):
    _save(tmp_path, 1, 2, 3)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(_state(0), step=2)
        assert restored is not None and restored.step == 2 and restored.extra == {"seen": 2}
        _assert_equal(restored.state, _state(2))
        with pytest.raises(CheckpointError, match="00000007"):
            checkpointer.restore(_state(0), step=7)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    w = jnp.sin(jnp.arange(500_000.0))
    expected = np.array(w)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": w}, {})
        for _ in range(3):
            w = overwrite(w)
        restored = checkpointer.restore({"w": w})
    assert restored is not None
    np.testing.assert_array_equal(restored.state["w"], expected)


@ignore_late_reads
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_falls_back_to_the_older_one_and_says_so(tmp_path, damage, caplog):
    _save(tmp_path, 10, 20)
    damage(tmp_path / "00000020")
    with caplog.at_level(logging.WARNING), Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(_state())
        assert restored is not None and restored.step == 10
        _assert_equal(restored.state, _state(10))
        assert f"{tmp_path / '00000020'} is damaged" in caplog.text
        assert (tmp_path / "00000020").exists()  # only reading changes nothing
        # The run goes on from step 10 and comes to step 20 again.
        checkpointer.save(20, restored.state, {})
        again = checkpointer.restore(_state())
        assert again is not None and again.step == 20
    assert (tmp_path / "00000020.damaged").exists()


@ignore_late_reads
@pytest.mark.parametrize("damage", DAMAGES)
def test_only_checkpoint_damaged_is_an_error_never_a_fresh_start(tmp_path, damage):
    _save(tmp_path, 10)
    damage(tmp_path / "00000010")
    with Checkpointer(tmp_path) as checkpointer:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact(.|\n)*--run-dir"):
                checkpointer.restore(_state())


def test_zero_filled_values_are_refused_even_if_the_storage_layer_accepts_them(tmp_path, monkeypatch):
    _save(tmp_path, 10)
    monkeypatch.setattr(checkpoint.jnp, "asarray", lambda x: jax.device_put(np.zeros_like(x)))
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="not those that were saved"):
        checkpointer.restore(_state())


def test_checkpoint_of_another_config_lists_what_differs_and_does_not_fall_back(tmp_path):
    _save(tmp_path, 10, 20)
    like = _state()
    like["params"]["w"] = jnp.zeros((16, 25))
    like["rest"]["bias"] = jnp.zeros(8, jnp.int32)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.restore(like)
    message = str(error.value)
    assert "00000020 is a checkpoint of another config: 2 of its arrays differ" in message
    assert "params/w: checkpoint float32[16, 24], this config float32[16, 25]" in message
    assert "rest/bias: checkpoint int8[8], this config int32[8]" in message


def test_keeps_the_newest_and_never_prunes_before_the_new_one_is_complete(tmp_path):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, _state(step), {})
            assert step == 1 or step - 1 in checkpointer.steps()
            checkpointer.wait()
            assert checkpointer.steps() == [step]
    _save(tmp_path / "three", 1, 2, 3, 4, 5, keep=3)
    assert Checkpointer(tmp_path / "three").steps() == [3, 4, 5]


def test_saving_a_saved_step_again_is_harmless(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, _state(1), {"seen": 1})
        checkpointer.save(1, _state(1), {"seen": 1})
        checkpointer.wait()
        assert checkpointer.steps() == [1]


def test_steps_of_an_earlier_session_are_not_taken_for_ours(tmp_path):
    _save(tmp_path, 1)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="restore the newest"):
        checkpointer.save(1, _state(2), {})


def test_interrupted_save_is_ignored_and_cleared_by_the_next_save(tmp_path):
    _save(tmp_path, 1)
    unfinished = tmp_path / "00000002.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(_state())
        assert restored is not None and restored.step == 1
        assert unfinished.exists()  # it may be another process's save in flight
        checkpointer.save(2, _state(2), {})
    assert not unfinished.exists()


def test_failed_asynchronous_save_surfaces_at_the_next_call_and_leaves_the_older_intact(tmp_path):
    # A file size limit fails like a full disk: while the data are being written.
    state = {"w": jax.random.normal(jax.random.key(0), (64, 1024))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        checkpointer.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
            with pytest.raises(
                CheckpointError, match=r"cannot save step 2 in .*: File too large; .*Complete checkpoints there: \[1\]"
            ):
                checkpointer.save(2, state, {})
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        restored = checkpointer.restore(state)
        assert restored is not None and restored.step == 1
        checkpointer.save(3, state, {})  # there is room again
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    checkpointer = Checkpointer(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"cannot save step 1 in .*/file/checkpoints"):
        checkpointer.save(1, _state(), {})


def test_what_cannot_be_saved_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match=r"state\[step\] is a int"):
            checkpointer.save(1, {"step": 3}, {})
        with pytest.raises(TypeError, match="JSON"):
            checkpointer.save(1, _state(), {"x": object()})
        with pytest.raises(ValueError, match="keep = 0"):
            Checkpointer(tmp_path, keep=0)
        assert checkpointer.steps() == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_fingerprint_is_the_same_on_every_sharding_and_by_both_implementations(dtype):
    x = (jax.random.normal(jax.random.key(0), (16, 8, 3)) * 3).astype(dtype)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    expected = fingerprints({"x": x})["x"]
    for spec in (PartitionSpec("a", "b"), PartitionSpec(None, "a")):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        assert fingerprints({"x": sharded})["x"] == expected
        assert int(checkpoint._fingerprint_on_device(sharded)) == expected


def test_fingerprint_sees_every_bit_and_every_position():
    x = jnp.zeros((4, 6)).at[1, 2].set(1.0)
    base = fingerprints({"x": x})["x"]
    variants = {
        "zeros": x * 0,
        "negative zero": x.at[0, 0].set(-0.0),
        "moved": jnp.roll(x, 1, axis=1),
        "last bit": x.at[1, 2].set(np.nextafter(np.float32(1), np.float32(2))),
        "transposed": x.T.reshape(4, 6),
        "swapped rows": x[::-1],
    }
    assert base not in fingerprints(variants).values()


_KILLED = """
import os, random, signal, sys, time
import jax, jax.numpy as jnp
from moe_jax.training.checkpoint import Checkpointer

directory, rounds = sys.argv[1], int(sys.argv[2])

def state(step):
    return {"w": jnp.arange(20_000.0) + step, "v": jnp.full((50, 50), step, jnp.bfloat16), "step": jnp.int32(step)}

def child(report):
    checkpointer = Checkpointer(directory, keep=2)
    restored = checkpointer.restore(state(0))
    step = restored.step if restored else 0
    if restored:
        assert restored.extra == {"step": step}
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state(step))))
    os.write(report, b"%d r\\n" % step)
    while True:
        step += 1
        checkpointer.save(step, state(step), {"step": step})
        checkpointer.wait()
        os.write(report, b"%d s\\n" % step)

rng, complete = random.Random(0), 0
for number in range(rounds):
    read, write = os.pipe()
    pid = os.fork()  # before JAX starts any thread
    if pid == 0:
        try:
            child(write)
        finally:
            os._exit(1)
    os.close(write)
    lines = os.fdopen(read)
    restored = lines.readline()
    assert restored, "restore failed"
    assert complete <= int(restored.split()[0]) <= complete + 1, (restored, complete)
    for _ in range(number % 3):  # whole saves, however slow the machine is; then somewhere in the next one
        complete = int(lines.readline().split()[0])
    time.sleep(rng.uniform(0, 0.4))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for line in lines:
        complete = int(line.split()[0])
    complete = max(complete, int(restored.split()[0]))
print(complete)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_of_a_save_loses_at_most_that_save(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _KILLED, str(tmp_path), "6"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 6  # those that were waited for


def test_manifest_is_readable_by_people(tmp_path):
    _save(tmp_path, 1)
    record = json.loads((tmp_path / "00000001" / "manifest" / "metadata").read_text())
    arrays = json.loads(record["content"])["arrays"]
    assert arrays["params/w"]["shape"] == [16, 24]
    assert arrays["params/half"]["dtype"] == "bfloat16"


HALF_DAMAGED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.distributed import barrier, ending_together, initialize

initialize(start_seconds=60, shutdown_seconds=20)
with ending_together():
    action, *folders = sys.argv[1:]
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    place = {name: NamedSharding(mesh, PartitionSpec(*axes)) for name, axes in (("divided", ["x"]), ("whole", []))}
    values = {name: np.arange(8 * 300, dtype=np.float32).reshape(8, 300) for name in place}
    def put(step):
        return {name: jax.make_array_from_callback((8, 300), sharding, lambda index: step * values[name][index])
                for name, sharding in place.items()}

    with Checkpointer(folders[jax.process_index()]) as checkpoints:
        if action == "save":
            for step in (1, 2):
                checkpoints.save(step, put(step), {"seen": step})
        else:
            found = checkpoints.restore(put(0))
            right = all(np.array_equal(shard.data, found.step * values[name][shard.index])
                        for name, x in found.state.items() for shard in x.addressable_shards)
            print("restored", found.step, found.extra, right)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "victim"), [(_truncate, 1), (_break_manifest, 0), (_zero_fill, 1)])
def test_a_checkpoint_that_is_damaged_for_one_process_is_taken_by_none(tmp_path, damage, victim):
    """The processes see two folders that differ, as a network's file system may show them."""
    (tmp_path / "worker.py").write_text(HALF_DAMAGED)

    def run(*arguments):
        command = [sys.executable, "-m", "launch.local", "--processes", "2", "--devices", "2", "--hang-seconds", "60"]
        command += ["--", str(tmp_path / "worker.py"), *map(str, arguments)]
        paths = os.environ | {"PYTHONPATH": os.getcwd()}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=paths)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    folders = [tmp_path / "a", tmp_path / "b"]
    run("save", folders[0], folders[0])
    shutil.copytree(*folders)
    damage(folders[victim] / "00000002")
    said = run("restore", *folders)
    for process in range(2):
        assert f"[{process}] restored 1 {{'seen': 1}} True" in said, said
