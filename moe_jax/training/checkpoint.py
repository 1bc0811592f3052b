"""Checkpoints of a run: written by Orbax in the background, atomic, and checked value by value when they are read.

A training state is any pytree of `jax.Array`s (NNX states, Optax states, typed PRNG keys). With every array goes a
32-bit fingerprint computed on the device: restoring computes it again and refuses what differs. A file that is
missing, truncated or zero-filled is therefore never taken for data, whatever the storage layer makes of it.

On disk: `<directory>/00000010/` is the complete checkpoint of step 10 (the folder is renamed to this name last).
`*.orbax-checkpoint-tmp*` is a save in flight or one that was interrupted; `*.damaged` was set aside because it could
not be read; `*.deleting` is an old checkpoint on its way out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.training.distributed import gather

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

# Orbax narrates every save through absl's logger. What matters of it reaches the user as a CheckpointError or as one
# warning of this file.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)

_STEP = re.compile(r"\d{8,}")
_LEFTOVER = re.compile(r"\d{8,}\.(orbax-checkpoint-tmp.*|deleting)")
_PLAIN_CAUSE = re.compile(r"No space left on device|Disk quota exceeded|File too large|Read-only file system")
_WAS_COMPLETE = re.compile(r"\d{8,}(\.damaged.*|\.deleting)?")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: the message names the folder, the cause and the remedy."""


class Restored(NamedTuple):
    """What `Checkpointer.restore` found."""

    step: int
    state: Any
    """Same structure, shapes, dtypes and shardings as `like`."""
    extra: dict[str, Any]


class _Damaged(Exception):
    """A checkpoint whose content is not what was saved."""


class Checkpointer:
    """Saves and restores a training state under one folder, keeping the newest `keep` checkpoints.

    All methods may be called from any thread. In a job of several processes all of them call `save`, `wait` and
    `restore` alike, on a folder that they share.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep = {keep}: must be 1 or greater")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._lock = threading.RLock()
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._known: set[int] = set()  # steps that this object saved or restored
        self._damaged: set[int] = set()  # steps that could not be restored
        self._in_flight: int | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, ascending."""
        return sorted(int(name) for name in self._names() if _STEP.fullmatch(name))

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts to save `state` (a pytree of jax.Arrays) and `extra` (JSON) as the checkpoint of `step`.

        Returns once the arrays are copied from the devices, so they may be donated; the files are written in the
        background. A step that this object has saved or restored before is left as it is.

        Raises:
          CheckpointError: this save could not start, or the one before failed. Older checkpoints are intact.
          TypeError: a leaf is not a jax.Array, or `extra` is not JSON.
        """
        with self._lock:
            self.wait()
            path = self._path(step)
            if path.exists() and step not in self._damaged:
                if step in self._known:
                    return
                raise CheckpointError(
                    f"{path} already exists and comes from another session: restore the newest checkpoint of this"
                    f" folder before saving, or move the folder away"
                )
            arrays = _flatten(state)
            for name, leaf in arrays.items():
                if not isinstance(leaf, jax.Array):
                    raise TypeError(f"state[{name}] is a {type(leaf).__name__}: a checkpoint holds jax.Arrays only")
            arrays = {name: _raw(leaf) for name, leaf in arrays.items()}
            manifest = _manifest(state, fingerprints(arrays))
            content = json.dumps({"step": step, "arrays": manifest, "extra": dict(extra)}, allow_nan=False)
            record = {"sha256": hashlib.sha256(content.encode()).hexdigest(), "content": content}
            arrays = {name: leaf for name, leaf in arrays.items() if leaf.size}  # Orbax refuses empty arrays
            self._in_flight = step
            try:
                orbax = self._orbax = self._orbax or ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
                if jax.process_index() == 0:
                    self.directory.mkdir(parents=True, exist_ok=True)
                    self._clear_leftovers()
                orbax.save(
                    path, args=ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(record))
                )
            except Exception as error:
                self._fail(error)

    def wait(self) -> None:
        """Blocks until the save in flight is complete on disk, then deletes checkpoints beyond `keep`.

        Raises:
          CheckpointError: the save failed. Older checkpoints are intact.
        """
        with self._lock:
            if self._in_flight is None:
                return
            assert self._orbax is not None
            try:
                self._orbax.wait_until_finished()
            except Exception as error:
                self._fail(error)
            if not self._path(self._in_flight).exists():
                self._fail(FileNotFoundError(f"{self._path(self._in_flight)} vanished"))
            self._known.add(self._in_flight)
            self._in_flight = None
            if jax.process_index() == 0:
                self._prune()

    def close(self) -> None:
        """Waits for the save in flight and releases the background threads.

        Raises:
          CheckpointError: the save in flight failed.
        """
        with self._lock:
            try:
                self.wait()
            finally:
                if self._orbax is not None:
                    self._orbax.close()
                    self._orbax = None

    def restore(self, like: Any, *, step: int | None = None, partial: bool = False) -> Restored | None:
        """The newest checkpoint that is intact, or None if the folder never held a complete one.

        Args:
          like: pytree of jax.Arrays or jax.ShapeDtypeStructs. A leaf with a sharding (a struct's, or that of an array
            that is committed to its devices) is restored with it, on any number of devices; any other leaf becomes
            an uncommitted array on the default device.
          step: read the checkpoint of this step and no other.
          partial: restore only the arrays whose paths are in `like`, e.g. `{"params": ...}`. By default the
            checkpoint must hold exactly these.

        Raises:
          CheckpointError: the checkpoint is of another config (the first differing arrays are listed), or none of
            the checkpoints is intact. One that is damaged for any of the processes is logged as a warning, and all try
            the next older.
        """
        with self._lock:
            self.wait()
            reasons = []
            # What one process sees decides: file systems over the network show news at different times.
            steps: list[int] = gather(self.steps())[0][::-1] if step is None else [step]
            for step in steps:
                path = self._path(step)
                try:
                    manifest, extra = _together(lambda path=path, step=step: _read_manifest(path, step))
                    _compare_structure(path, manifest, like, partial)
                    state = _read_arrays(path, manifest, like)
                except _Damaged as damage:
                    reasons.append(f"{path}: {damage}")
                    logger.warning("Checkpoint %s is damaged (%s): trying the next older one.", path, damage)
                    self._damaged.add(step)
                    continue
                self._known.add(step)
                return Restored(step, state, extra)
            lost = [name for name in self._names() if _WAS_COMPLETE.fullmatch(name)]
            if not lost:
                return None
            reasons = reasons or [f"only {', '.join(lost)} left"]
            raise CheckpointError(
                f"no checkpoint in {self.directory} is intact:\n  " + "\n  ".join(reasons) + "\nBring the files back"
                " from a copy, or start again: with another --run-dir, or by moving this folder away."
            )

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def _names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in self.directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"cannot read {self.directory}: {error}. Restore access to it") from error

    def _clear_leftovers(self) -> None:
        for name in self._names():
            if _LEFTOVER.fullmatch(name):
                shutil.rmtree(self.directory / name)
        for step in self._damaged:
            path = self._path(step)
            if path.exists():
                aside = path.with_suffix(".damaged")
                while aside.exists():
                    aside = aside.with_name(aside.name + "+")
                path.rename(aside)
                logger.warning("Set the damaged checkpoint %s aside as %s.", path, aside.name)
        self._damaged.clear()

    def _prune(self) -> None:
        for step in [step for step in self.steps() if step not in self._damaged][: -self.keep]:
            # Renamed first, so that a deletion that is interrupted leaves no half of a checkpoint under its own name.
            doomed = self._path(step).with_suffix(".deleting")
            try:
                self._path(step).rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                raise CheckpointError(
                    f"cannot delete the old checkpoint {self._path(step)}: {_describe(error)}. Newer ones are complete"
                ) from error

    def _fail(self, error: Exception) -> None:
        """Turns a failed save into a CheckpointError, and leaves the object ready for another try."""
        step, self._in_flight = self._in_flight, None
        with suppress(Exception):  # Orbax may hold the same error a second time
            if self._orbax is not None:
                self._orbax.close()
        self._orbax = None
        with suppress(OSError):  # what was written so far only takes space from the next try
            for name in self._names():
                if name.startswith(f"{step:08d}.orbax-checkpoint-tmp"):
                    shutil.rmtree(self.directory / name)
        complete = self.steps()
        raise CheckpointError(
            f"cannot save step {step} in {self.directory}:"
            f" {_describe(error)}. Complete checkpoints there: {complete or 'none'}. If the disk is full or"
            f" read-only, make room or restore write access; the same command then resumes"
        ) from error


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """A 32-bit number for each array, that depends on every bit and its position, and not on the sharding.

    Each element's bits are mixed with a hash of its position (the finalizer of MurmurHash3), and summed modulo 2^32:
    integer addition is associative, so the result is the same on any mesh.
    """
    on_device = {name: _fingerprint_on_device(x) for name, x in arrays.items() if not _on_host(x)}
    own = {name: _fingerprint_of_own_shards(x) for name, x in arrays.items() if _on_host(x)}
    shared = {name: part for name, part in own.items() if not arrays[name].is_fully_addressable}
    if shared:
        own |= {name: sum(process[name] for process in gather(shared)) for name in shared}
    return {name: int(value) % 2**32 for name, value in (jax.device_get(on_device) | own).items()}


def _on_host(x: jax.Array) -> bool:
    # XLA takes about 50 ms for each shape to compile what NumPy does in one: only worth it away from the host.
    return all(device.platform == "cpu" for device in x.sharding.device_set)


@jax.jit
def _fingerprint_on_device(x: jax.Array) -> jax.Array:
    return _fingerprint(x, jnp, x.shape, (0,) * x.ndim)


def _fingerprint_of_own_shards(x: jax.Array) -> int:
    """This process's part of the sum, which counts each element of the array once over all processes."""
    shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    starts = [tuple(index.start or 0 for index in shard.index) for shard in shards]
    parts = [_fingerprint(np.asarray(s.data), np, x.shape, start) for s, start in zip(shards, starts, strict=True)]
    return sum(int(part) for part in parts)


def _fingerprint(x: Any, xnp: Any, shape: tuple[int, ...], start: tuple[int, ...]) -> Any:
    """The part of `fingerprints` that a block of an array of `shape`, beginning at `start`, adds to the sum; by NumPy
    or by jax.numpy (`xnp`)."""
    per_element = max(x.dtype.itemsize // 4, 1)  # 64-bit types count as two elements along the last axis
    shape, start = shape or (1,), start or (0,)
    if xnp.iscomplexobj(x):
        shape, start, per_element = (*shape, 2), (*start, 0), per_element // 2
        x = xnp.stack([x.real, x.imag], axis=-1)
    x = x.reshape(x.shape or (1,))
    if x.dtype == bool:
        x = x.astype(xnp.uint8)
    unsigned = {1: xnp.uint8, 2: xnp.uint16}.get(x.dtype.itemsize, xnp.uint32)
    bits = x.view(unsigned).astype(xnp.uint32)
    shape = (*shape[:-1], shape[-1] * per_element)
    start = (*start[:-1], start[-1] * per_element)
    position, stride = xnp.uint32(0x9E3779B9), 1
    for axis in reversed(range(bits.ndim)):
        index = xnp.arange(bits.shape[axis], dtype=xnp.uint32) + xnp.uint32(start[axis] % 2**32)
        index = index * xnp.uint32(stride % 2**32)
        position = position + index.reshape([-1 if a == axis else 1 for a in range(bits.ndim)])
        stride *= shape[axis]
    return xnp.sum(_mix(bits ^ _mix(position, xnp), xnp), dtype=xnp.uint32)


def _mix(x: Any, xnp: Any) -> Any:
    x = (x ^ (x >> 16)) * xnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * xnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"two arrays of the state have the path {name!r}: rename one")
        leaves[name] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: jax.Array) -> jax.Array:
    """Typed PRNG keys are stored as the integers that they are made of."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _manifest(tree: Any, prints: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "fingerprint": prints[name]}
        for name, leaf in _flatten(tree).items()
    }


def _together(read: Callable[[], Result]) -> Result:
    """read(), or `_Damaged` in every process if it is in one: all of them take the same checkpoint."""
    result, damage = None, None
    try:
        result = read()
    except _Damaged as error:
        damage = str(error)
    said = {process: text for process, text in enumerate(gather(damage)) if text is not None}
    if damage is not None:
        raise _Damaged(damage)
    if said:
        raise _Damaged("; ".join(f"process {process}: {text}" for process, text in list(said.items())[:3]))
    return cast(Result, result)


def _restorer() -> ocp.Checkpointer:
    """Each process reads by itself: one that fails would leave the others waiting at Orbax's barrier."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix="read"
    )
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _read_manifest(path: Path, step: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    try:
        with _restorer() as reader:
            record = reader.restore(path, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
        text = record["content"]
        intact = hashlib.sha256(text.encode()).hexdigest() == record["sha256"]
        content = json.loads(text)
        if not intact or content["step"] != step:
            raise ValueError("its checksum or its step does not fit")
        return content["arrays"], content["extra"]
    except Exception as error:
        raise _Damaged(f"{path / 'manifest'} is unreadable: {_describe(error)}") from error


def _compare_structure(path: Path, manifest: Mapping[str, Mapping[str, Any]], like: Any, partial: bool) -> None:
    saved = {name: f"{entry['dtype']}{entry['shape']}" for name, entry in manifest.items()}
    wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _flatten(like).items()}
    names = list(wanted) if partial else [*wanted, *(name for name in saved if name not in wanted)]
    differing = [name for name in names if saved.get(name) != wanted.get(name)]
    if differing:
        lines = [
            f"  {n}: checkpoint {saved.get(n, 'absent')}, this config {wanted.get(n, 'absent')}" for n in differing
        ]
        more = [f"  … and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise CheckpointError(
            f"{path} is a checkpoint of another config: {len(differing)} of its arrays differ\n"
            + "\n".join(lines[:8] + more)
            + "\nUse the config it was made with, or another --run-dir."
        )


def _read_arrays(path: Path, manifest: Mapping[str, Mapping[str, Any]], like: Any) -> Any:
    wanted = _flatten(like)
    structs, args, empty = {}, {}, {}
    for name, leaf in wanted.items():
        raw = jax.eval_shape(_raw, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        sharding = leaf.sharding if getattr(leaf, "committed", True) else None
        if isinstance(leaf, jax.Array) and sharding is not None:
            sharding = _raw(leaf).sharding
        if not raw.size:
            empty[name] = (
                jnp.zeros(raw.shape, raw.dtype)
                if sharding is None
                else jax.device_put(jnp.zeros(raw.shape, raw.dtype), sharding)
            )
            continue
        structs[name] = jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)
        if sharding is None:
            args[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=raw.dtype)
        else:
            args[name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=raw.shape, dtype=raw.dtype)
    arrays = (_together(lambda: _read_files(path, structs, args)) if structs else {}) | empty
    found = fingerprints(arrays)
    wrong = [name for name in arrays if found[name] != manifest[name]["fingerprint"]]

    def compare() -> None:
        if wrong:
            shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise _Damaged(f"the values of {shown} in {path / 'state'} are not those that were saved")

    _together(compare)
    leaves = [
        jax.random.wrap_key_data(arrays[name], impl=_key_impl(leaf)) if _is_key(leaf) else arrays[name]
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read_files(path: Path, structs: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, jax.Array]:
    """This process's shards of the arrays."""
    try:
        with _restorer() as reader:
            restore_args = ocp.args.PyTreeRestore(item=structs, restore_args=args, partial_restore=True)
            restored = reader.restore(path, args=ocp.args.Composite(state=restore_args))["state"]
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # out of memory says nothing about the files
    except Exception as error:
        raise _Damaged(f"{path / 'state'} is unreadable: {_describe(error)}") from error
    return {name: x if isinstance(x, jax.Array) else jnp.asarray(x) for name, x in restored.items()}


def _key_impl(leaf: Any) -> Any:
    return jax.random.key_impl(leaf) if isinstance(leaf, jax.Array) else leaf.dtype._impl.name


def _describe(error: BaseException) -> str:
    """What went wrong in a line: storage libraries wrap "disk full" several times, in paragraphs."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 20:
        causes.append(cause)
    plain = _PLAIN_CAUSE.search("\n".join(map(str, causes)))
    texts = [plain.group()] if plain else []
    for cause in (error, causes[-1]):
        text = f"{type(cause).__name__}: {str(cause).strip()[:300]}".split("\n")[0]
        if text not in texts:
            texts.append(text)
    return "; ".join(texts)
