"""A folder of safetensors files, read as memory-mapped arrays and written atomically.

The format is an 8-byte length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors). These
lines are ours because the `safetensors` library (0.8), under NumPy, has no FP8, copies what it reads, and writes only
what is in memory as a whole. Files written here are tested with that library, and files written by it are read here.

A folder written here also has `SHA256SUMS` (`sha256sum -c SHA256SUMS` checks it too): the format cannot tell changed
bytes from weights.
"""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.interop.fp8 import FP8
from moe_jax.interop.low_bits import Form, Packed, sources

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "SHA256SUMS"

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": FP8,
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
Encode = Callable[[str, np.ndarray], Iterable[tuple[str, np.ndarray]]]
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_CHUNK_BYTES = 16 * 2**20
_AGAIN = "download or export the file again"


class CheckpointFilesError(ValueError):
    """Files of a checkpoint are missing, incomplete, corrupt or contradictory; the message names file and remedy."""


class WeightFiles:
    """The tensors of a folder: `model.safetensors`, or the shards of `model.safetensors.index.json`, or the one
    `*.safetensors` file there is.

    Opening reads the headers alone and checks that every file is whole and agrees with the index. Reading gives
    memory-mapped views; pages are loaded when touched and the system may drop them again.

    Weights in 8 or 4 bits (`moe_jax.interop.low_bits`) are read as float32, or as they are kept in memory. They have
    the weight's name, and their parts none. Raises CheckpointFilesError.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        weight_map, shards = _find_shards(self.folder)
        self._tensors: dict[str, np.ndarray] = {}
        home: dict[str, str] = {}
        for shard in shards:
            for name, tensor in _open_shard(self.folder / shard).items():
                if name in home:
                    raise CheckpointFilesError(
                        f"{self.folder}: tensor {name!r} is in both {home[name]} and {shard}; delete the stale file"
                    )
                home[name], self._tensors[name] = shard, tensor
        for name, shard in weight_map.items():
            if home.get(name) != shard:
                raise CheckpointFilesError(
                    f"{self.folder / INDEX}: says that tensor {name!r} is in {shard}, which does not hold it; "
                    "the index and the shards are of different downloads or exports: fetch both again"
                )
        try:
            self._low_bits, self._parts = sources(self._tensors)
        except ValueError as error:
            raise CheckpointFilesError(f"{self.folder}: {error}") from error

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of the files."""
        whole = (name for name in self._tensors if name not in self._parts)
        return tuple(dict.fromkeys([*whole, *self._low_bits]))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._low_bits[name].shape if name in self._low_bits else self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The type that `read` gives (float32 for weights in low bits)."""
        return np.dtype(np.float32) if name in self._low_bits else self._tensor(name).dtype

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or its part `index` (one slice per axis; axes left out are whole).

        A read-only view of the file, without a copy; of a weight in low bits a new float32 array, of FP8 of just that
        part.
        """
        if name not in self._low_bits:
            return self._tensor(name)[index]
        with self._naming(name):
            return self._low_bits[name].read(index)

    def form(self, name: str) -> Form | None:
        """That of a weight in low bits; None for other tensors."""
        return self._low_bits[name].form if name in self._low_bits else None

    def packed(self, name: str) -> Packed:
        """A weight in low bits as it is kept in memory."""
        with self._naming(name):
            return self._low_bits[name].packed()

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise CheckpointFilesError(f"{self.folder}: tensor {name!r}: {error}; {_AGAIN}") from error

    def verify(self, suffix: str = "") -> tuple[str, ...]:
        """Compares files with `SHA256SUMS`, all or those whose names end so, and returns the names compared: none when
        the folder has no such file.

        Reads all bytes. Raises CheckpointFilesError with the first file that is missing or has changed.
        """
        manifest = self.folder / CHECKSUMS
        if not manifest.exists():
            return ()
        expected = dict(line.split("  ", 1)[::-1] for line in manifest.read_text(encoding="utf-8").splitlines())
        compared = tuple(name for name in expected if name.endswith(suffix))
        for name in compared:
            path, digest = self.folder / name, expected[name]
            if not path.exists():
                raise CheckpointFilesError(f"{path}: listed in {CHECKSUMS} but missing; {_AGAIN}")
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != digest:
                raise CheckpointFilesError(f"{path}: SHA-256 is {actual}, {CHECKSUMS} says {digest}; {_AGAIN}")
        return compared

    def _tensor(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise CheckpointFilesError(f"{self.folder}: no tensor {name!r} in its safetensors files")
        return self._tensors[name]


def _find_shards(folder: Path) -> tuple[dict[str, str], list[str]]:
    """(index: tensor → file, files to open); the index is empty where one file holds everything."""
    if not folder.is_dir():
        raise CheckpointFilesError(f"{folder}: no such folder; give the folder that holds {SINGLE} or {INDEX}")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in files:  # before the index, as transformers does
        return {}, [SINGLE]
    if (folder / INDEX).exists():
        weight_map = _read_index(folder / INDEX)
        missing = sorted(set(weight_map.values()) - set(files))
        if missing:
            raise CheckpointFilesError(f"{folder}: {INDEX} names {', '.join(missing)}, not there; finish the download")
        return weight_map, sorted(set(weight_map.values()))
    if len(files) == 1:
        return {}, files
    if files:
        raise CheckpointFilesError(f"{folder}: {len(files)} safetensors files but no {INDEX}; download the index too")
    if any(folder.glob("*.bin")):
        raise CheckpointFilesError(
            f"{folder}: holds PyTorch pickles (*.bin) only; convert them to safetensors, for instance by transformers' "
            "from_pretrained and save_pretrained"
        )
    raise CheckpointFilesError(f"{folder}: holds no safetensors file; give the folder with {SINGLE} or {INDEX}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointFilesError(f"{path}: not a JSON object with a weight_map ({error}); {_AGAIN}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointFilesError(f"{path}: weight_map must map tensor names to file names; {_AGAIN}")
    return weight_map


def _open_shard(path: Path) -> dict[str, np.ndarray]:
    """Name → memory-mapped array, in the order of the file, once its size and its header agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointFilesError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        header_bytes = int.from_bytes(start[:8], "little")
        if size < 8 or not any(start[:8]):
            raise CheckpointFilesError(f"{path}: empty or zero-filled, an interrupted download; {_AGAIN}")
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointFilesError(
                f"{path}: says its header has {header_bytes} bytes, the file has {size}: truncated, or not a "
                f"safetensors file; {_AGAIN}"
            )
        file.seek(8)
        header = _parse_header(path, file.read(header_bytes))
    entries = []
    try:
        for name, entry in header.items():
            begin, stop = map(int, entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            if min(shape, default=0) < 0:
                raise ValueError(f"{name!r} has shape {shape}")
            entries.append((begin, stop, name, str(entry["dtype"]), shape))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointFilesError(f"{path}: an entry of its header is malformed ({error!r}); {_AGAIN}") from error

    data_start = 8 + header_bytes
    end = 0
    for begin, stop, name, dtype, shape in sorted(entries):
        if dtype not in _DTYPES:
            raise CheckpointFilesError(
                f"{path}: tensor {name!r} has type {dtype}; understood: {', '.join(_DTYPES)}. Convert it to one of them"
            )
        if stop - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise CheckpointFilesError(
                f"{path}: tensor {name!r} has {stop - begin} bytes, not those of {dtype} {list(shape)}; {_AGAIN}"
            )
        if begin != end:
            raise CheckpointFilesError(f"{path}: tensor {name!r} begins at {begin} instead of {end}; {_AGAIN}")
        end = stop
    if size != data_start + end:
        what = "truncated" if size < data_start + end else "longer than its header says"
        raise CheckpointFilesError(f"{path}: {what}: {size} bytes instead of {data_start + end}; {_AGAIN}")

    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)[data_start:]
    return {name: data[b:e].view(_DTYPES[dtype]).reshape(shape) for b, e, name, dtype, shape in sorted(entries)}


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointFilesError(f"{path}: its header has {twice!r} twice; {_AGAIN}")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except CheckpointFilesError:
        raise
    except ValueError as error:
        raise CheckpointFilesError(f"{path}: its header is not JSON ({error}); corrupt: {_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointFilesError(f"{path}: its header is not a JSON object; corrupt: {_AGAIN}")
    header.pop("__metadata__", None)
    return header


def write_folder(
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    files: Mapping[str, str | bytes],
    *,
    max_shard_bytes: int = 5_000_000_000,
    encode: Encode | None = None,
) -> None:
    """Writes tensors and other files (name → content) as a Hugging Face folder, all of it or nothing.

    Tensors are taken one at a time and may be lazily made. They go to `model.safetensors`, or to
    `model-00001-of-0000N.safetensors` and an index once they exceed `max_shard_bytes`. With `encode`, what it makes of
    each name and tensor is written; its ValueErrors are given the tensor's name.

    The work is done in a folder of its own beside it, `<folder>.*.partial`, which takes the final name last and is
    removed when the export fails; the next export removes what a killed one left. Of several exports to one folder the
    first to be complete stays. Raises CheckpointFilesError: the folder is not empty, a name comes twice, a type has no
    safetensors form, the disk is full.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointFilesError(f"{folder}: exists and is not empty; choose another folder or delete it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    partial, lock = _own_folder(folder)
    try:
        sums = _write_shards(partial, _stored(tensors, encode), max_shard_bytes)
        for name, content in files.items():
            sums[name] = _write_file(partial / name, content)
        _write_file(partial / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        _sync_folder(partial)
        partial.rename(folder)
        _sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise CheckpointFilesError(
                f"{folder}: another export to this folder was complete first, and stays; choose another folder"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointFilesError(
                f"{folder}: the disk (or the quota) was full before all weights were written, and nothing was kept; "
                "free space or choose another disk. An export needs its own size and one shard more"
            ) from error
        raise
    finally:
        os.close(lock)


def _own_folder(folder: Path) -> tuple[Path, int]:
    """A new folder beside `folder`, and its lock."""
    while True:
        partial = Path(tempfile.mkdtemp(".partial", f"{folder.name}.", folder.parent))
        with suppress(FileNotFoundError, BlockingIOError):  # taken for abandoned before it was locked
            lock = _locked(partial)
            mask = os.umask(0)
            os.umask(mask)
            partial.chmod(0o777 & ~mask)
            return partial, lock


def _locked(folder: Path) -> int:
    """A lock that the kernel releases when this process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed exports left, and not what a running one writes."""
    for partial in folder.parent.glob(f"{glob.escape(folder.name)}.*.partial"):
        with suppress(OSError):  # locked by its export, or gone
            lock = _locked(partial)
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _stored(tensors: Iterable[tuple[str, np.ndarray]], encode: Encode | None) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors as they are stored."""
    for name, tensor in tensors:
        if encode is None:
            yield name, tensor
        else:
            try:
                yield from encode(name, tensor)
            except ValueError as error:
                raise CheckpointFilesError(f"tensor {name!r}: {error}") from error
        del tensor  # else it would live on while the next one is made


class _Entry(NamedTuple):
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # in the data as it came
    nbytes: int


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], max_shard_bytes: int) -> dict[str, str]:
    """Shards and index; returns file name → SHA-256.

    Offsets come before the data in the format but are known after it, so each shard's data goes to a nameless file
    first. That costs a second copy and lets tensors be ordered by the size of their type, as alignment wants.
    """
    shards: list[tuple[list[_Entry], str]] = []
    seen: set[str] = set()
    with tempfile.TemporaryFile(dir=folder) as data:
        entries: list[_Entry] = []

        def finish() -> None:
            digest = _assemble(folder / f"{len(shards)}.shard", data, entries)
            shards.append((entries, digest))
            data.seek(0)
            data.truncate()

        for name, tensor in tensors:
            if name in seen:
                raise CheckpointFilesError(f"tensor {name!r} comes twice; the mapping to Hugging Face names is wrong")
            if tensor.dtype not in _DTYPE_NAMES:
                raise CheckpointFilesError(f"tensor {name!r}: safetensors has no type {tensor.dtype}; cast it first")
            seen.add(name)
            if entries and data.tell() + tensor.nbytes > max_shard_bytes:
                finish()
                entries = []
            entries.append(_Entry(name, tensor.dtype, tensor.shape, data.tell(), tensor.nbytes))
            _write_array(data, tensor)
            del tensor
        finish()

    sums: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for i, (entries, digest) in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.shard").rename(folder / name)
        sums[name] = digest
        weight_map |= {entry.name: name for entry in entries}
    if len(shards) > 1:
        total = sum(entry.nbytes for entries, _ in shards for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        sums[INDEX] = _write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return sums


def _write_array(file: IO[bytes], array: np.ndarray) -> None:
    """The array's bytes in C order, by parts of the first axis: a transposed view is never copied as a whole."""
    array = np.atleast_1d(array)
    rows = max(1, _CHUNK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        file.write(np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8).data)


def _assemble(path: Path, data: IO[bytes], entries: list[_Entry]) -> str:
    """A safetensors file of the entries' data; returns its SHA-256."""
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on a format
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for entry in entries:
            data.seek(entry.begin)
            left = entry.nbytes
            while left:
                part = data.read(min(left, _CHUNK_BYTES))
                digest.update(part)
                file.write(part)
                left -= len(part)
        _sync(file)
    return digest.hexdigest()


def _write_file(path: Path, content: str | bytes) -> str:
    """Writes a small file; returns its SHA-256."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        _sync(file)
    return hashlib.sha256(content).hexdigest()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
