import errno
import hashlib
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.interop import fp8, weight_files
from moe_jax.interop.low_bits import LowBits, encoded
from moe_jax.interop.weight_files import INDEX, CheckpointFilesError, WeightFiles, write_folder

RNG = np.random.default_rng(0)
TENSORS = {
    "odd.bytes": np.arange(3, dtype=np.uint8),
    "a.float32": RNG.normal(size=(5, 7)).astype(np.float32),
    "a.bfloat16": RNG.normal(size=(4, 6, 2)).astype(ml_dtypes.bfloat16),
    "a.float16": RNG.normal(size=(9,)).astype(np.float16),
    "a.int64": np.arange(-3, 3),
    "a.bool": np.array([[True, False, True]]),
    "a.scalar": np.array(1.5, np.float32),
    "a.empty": np.zeros((0, 4), np.float32),
    "ünï.code": np.ones((2,), np.float64),
}


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def write_raw(path, header, data=b""):
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def sharded(tmp_path):
    """Three shards, with an FP8 weight among their tensors."""
    folder = tmp_path / "model"
    tensors = {f"layers.{i}.up_proj.weight": RNG.normal(size=(130, 8)).astype(np.float32) for i in range(3)}
    write_folder(folder, tensors.items(), {"config.json": "{}"}, max_shard_bytes=4200)
    return folder


# What is written is read


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_round_trip(tmp_path, max_shard_bytes):
    folder = tmp_path / "new" / "model"
    write_folder(
        folder, iter(TENSORS.items()), {"config.json": "{}", "sub/x.bin": b"\0\1"}, max_shard_bytes=max_shard_bytes
    )
    files = WeightFiles(folder)
    assert sorted(files.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert (files.shape(name), files.dtype(name)) == (tensor.shape, tensor.dtype)
        assert_same(files.read(name), tensor)
    assert (folder / "config.json").read_text() == "{}" and (folder / "sub/x.bin").read_bytes() == b"\0\1"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_names_of_shards_and_index(sharded):
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in sharded.iterdir()) == sorted([*names, INDEX, "config.json", "SHA256SUMS"])
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == 3 * 130 * 8 * 4
    assert index["weight_map"] == {f"layers.{i}.up_proj.weight": names[i] for i in range(3)}


def test_reading_is_a_view_of_the_file(tmp_path):
    write_folder(tmp_path / "m", TENSORS.items(), {})
    files = WeightFiles(tmp_path / "m")
    part = files.read("a.float32", (slice(1, 4), slice(None, None, 2)))
    assert_same(np.ascontiguousarray(part), np.ascontiguousarray(TENSORS["a.float32"][1:4, ::2]))
    assert not part.flags.owndata and not part.flags.writeable
    assert np.shares_memory(part, files.read("a.float32"))


def test_transposed_and_large_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "_CHUNK_BYTES", 64)  # many parts per tensor
    w = np.arange(60 * 70, dtype=np.float32).reshape(60, 70)
    write_folder(tmp_path / "m", [("w", w.T), ("v", w[::3, ::-2])], {})
    files = WeightFiles(tmp_path / "m")
    np.testing.assert_array_equal(files.read("w"), w.T)
    np.testing.assert_array_equal(files.read("v"), w[::3, ::-2])


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    folder = tmp_path / "m"
    write_folder(folder, TENSORS.items(), {})
    loaded = load_file(folder / "model.safetensors")
    assert sorted(loaded) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert_same(loaded[name], tensor)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}

    write_folder(tmp_path / "fp8", [("x.up_proj.weight", np.ones((130, 3), np.float32))], {}, encode=as_fp8)
    with safe_open(tmp_path / "fp8" / "model.safetensors", "numpy") as file:
        assert file.get_slice("x.up_proj.weight").get_dtype() == "F8_E4M3"
        np.testing.assert_array_equal(
            file.get_tensor("x.up_proj.weight_scale_inv"), np.full((2, 1), 1 / np.float32(448))
        )


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    from safetensors.numpy import save_file

    quantized, scale_inv = fp8.quantize_blocks(RNG.normal(size=(129, 4)))
    fp8_tensors = {"q.weight": quantized, "q.weight_scale_inv": scale_inv}
    save_file(TENSORS | fp8_tensors, tmp_path / "other_name.safetensors")
    files = WeightFiles(tmp_path)
    for name, tensor in TENSORS.items():
        assert_same(files.read(name), tensor)
    assert_same(files.read("q.weight"), fp8.dequantize_blocks(quantized, scale_inv))


def test_tensors_at_odd_offsets_are_read(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    write_raw(tmp_path / "model.safetensors", header, b"\7" + np.float32([1.5, -2]).tobytes())
    np.testing.assert_array_equal(WeightFiles(tmp_path).read("b"), [1.5, -2])


# FP8


def as_fp8(name, tensor):
    return encoded(name, tensor, LowBits("fp8"), None, None)


def matrices_as_fp8(name, tensor):
    return as_fp8(name, tensor) if tensor.ndim == 2 else [(name, tensor)]


def test_fp8_weights_are_quantised_and_read_as_float32(tmp_path):
    tensors = {
        "layers.0.up_proj.weight": RNG.normal(size=(130, 200)).astype(ml_dtypes.bfloat16),
        "layers.0.norm.weight": np.ones(200, ml_dtypes.bfloat16),
    }
    # The weight and its scales come to lie in different shards, as they may in DeepSeek's own files.
    write_folder(tmp_path / "m", tensors.items(), {}, max_shard_bytes=1, encode=matrices_as_fp8)
    files = WeightFiles(tmp_path / "m")
    assert sorted(files.names) == sorted(tensors)
    assert files.dtype("layers.0.up_proj.weight") == np.float32
    assert files.shape("layers.0.up_proj.weight") == (130, 200)
    assert files.dtype("layers.0.norm.weight") == ml_dtypes.bfloat16
    whole = fp8.dequantize_blocks(*fp8.quantize_blocks(tensors["layers.0.up_proj.weight"]))
    assert_same(files.read("layers.0.up_proj.weight"), whole)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3


@pytest.fixture(scope="module")
def fp8_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "m"
    write_folder(folder, [("w", RNG.normal(size=(260, 300)))], {}, encode=as_fp8)
    return WeightFiles(folder)


BOUNDS = st.none() | st.integers(-310, 310)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.builds(slice, BOUNDS, BOUNDS), columns=st.builds(slice, BOUNDS, BOUNDS, st.sampled_from([None, 1, 3, -2]))
)
def test_any_slice_of_an_fp8_weight(fp8_files, rows, columns):
    assert_same(fp8_files.read("w", (rows, columns)), np.ascontiguousarray(fp8_files.read("w")[rows, columns]))


@pytest.mark.parametrize(("scale", "message"), [(None, "'w_scale_inv'"), (np.ones((1, 2), np.float32), "128 x 128")])
def test_other_fp8_formats_are_refused(tmp_path, scale, message):
    tensors = {"w": np.ones((130, 130), fp8.FP8)} | ({} if scale is None else {"w_scale_inv": scale})
    write_folder(tmp_path / "m", tensors.items(), {})
    with pytest.raises(CheckpointFilesError, match=f"{message}.*convert the checkpoint to bfloat16"):
        WeightFiles(tmp_path / "m")


# Damaged, incomplete and contradictory folders are named


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated(sharded, keep):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointFilesError, match=r"model-00002-of-00003.safetensors: .*again"):
        WeightFiles(sharded)


def test_every_truncation_is_seen(tmp_path):
    write_folder(tmp_path / "m", [("w", np.ones((2, 3), np.float32))], {})
    path = tmp_path / "m" / "model.safetensors"
    content = path.read_bytes()
    for keep in range(len(content)):
        path.write_bytes(content[:keep])
        with pytest.raises(CheckpointFilesError, match=r"model\.safetensors"):
            WeightFiles(tmp_path / "m")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0" * 4096, "zero-filled"),
        ((10**6).to_bytes(8, "little") + b"{}", "header has 1000000 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((2).to_bytes(8, "little") + b"\xff{", "not JSON"),
        ({"w": ENTRY | {"shape": [3]}}, "'w' has 8 bytes"),
        ({"w": ENTRY | {"dtype": "F4"}}, "type F4"),
        ({"w": ENTRY | {"data_offsets": [4, 12]}}, "begins at 4 instead of 0"),
        ({"w": ENTRY, "v": ENTRY}, "begins at 0 instead of 8"),
        ({"w": {"dtype": "F32"}}, "malformed"),
        ({"w": ENTRY | {"shape": [-2, -1]}}, "malformed"),
        ({"w": ENTRY | {"shape": "x"}}, "malformed"),
        ({"w": ENTRY | {"shape": None}}, "malformed"),
        ({"w": ENTRY | {"data_offsets": ["a", 8]}}, "malformed"),
        ({"w": 3}, "malformed"),
        ({"w": ENTRY | {"data_offsets": [0, 4, 8]}}, "malformed"),
        (b'{"w":%s,"w":%s}' % ((json.dumps(ENTRY).encode(),) * 2), "'w' twice"),
        ({}, "longer than its header says"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    if isinstance(content, dict) or content.startswith(b'{"'):
        write_raw(path, content, bytes(8))
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointFilesError, match=f"model.safetensors: .*{message}"):
        WeightFiles(tmp_path)


def test_index_names_a_missing_shard(sharded):
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointFilesError, match=r"model-00003-of-00003.safetensors, not there; finish the download"):
        WeightFiles(sharded)


def test_index_of_another_export(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["layers.7.norm"] = "model-00001-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointFilesError, match=r"'layers.7.norm' is in model-00001.*fetch both again"):
        WeightFiles(sharded)


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointFilesError, match=r"'layers.0.up_proj.weight' is in both"):
        WeightFiles(sharded)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_bad_index(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointFilesError, match=f"{INDEX}.*weight_map"):
        WeightFiles(sharded)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ([], "holds no safetensors file"),
        (["pytorch_model.bin"], "convert them to safetensors"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "download the index"),
    ],
)
def test_folders_without_weights(tmp_path, present, message):
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointFilesError, match=message):
        WeightFiles(tmp_path)
    with pytest.raises(CheckpointFilesError, match="no such folder"):
        WeightFiles(tmp_path / "nowhere")


def test_unknown_name(sharded):
    with pytest.raises(CheckpointFilesError, match="no tensor 'nope'"):
        WeightFiles(sharded).read("nope")


def test_verify_names_the_file_that_changed(sharded):
    assert len(WeightFiles(sharded).verify()) == 5
    path = sharded / "model-00002-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    files = WeightFiles(sharded)  # the format cannot see it
    with pytest.raises(CheckpointFilesError, match=r"model-00002-of-00003.safetensors: SHA-256"):
        files.verify()
    path.unlink()
    with pytest.raises(CheckpointFilesError, match=r"model-00002-of-00003.safetensors: listed.*missing"):
        files.verify()
    (sharded / "SHA256SUMS").unlink()
    assert files.verify() == ()


def test_checksums_are_those_of_sha256sum(sharded):
    lines = (sharded / "SHA256SUMS").read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((sharded / name).read_bytes()).hexdigest() == digest
    assert len(lines) == len(list(sharded.iterdir())) - 1


# An export is all or nothing


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_export_leaves_nothing(tmp_path, error):
    def tensors():
        yield "a", np.ones(1000, np.float32)
        yield "b", np.ones(1000, np.float32)
        raise error

    with pytest.raises(error):
        write_folder(tmp_path / "m", tensors(), {}, max_shard_bytes=4000)
    assert list(tmp_path.iterdir()) == []


def test_killed_export_leaves_nothing_under_the_name_and_is_cleared_by_the_next(tmp_path):
    script = f"""
import os, numpy as np
from moe_jax.interop.weight_files import write_folder
def tensors():
    yield "a", np.ones(1000, np.float32)
    yield "b", np.ones(1000, np.float32)
    os.kill(os.getpid(), 9)
write_folder({str(tmp_path / "m")!r}, tensors(), {{}}, max_shard_bytes=4000)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    (left,) = (path.name for path in tmp_path.iterdir())
    assert left.startswith("m.") and left.endswith(".partial")
    write_folder(tmp_path / "m", [("a", np.ones(3, np.float32))], {})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert WeightFiles(tmp_path / "m").names == ("a",)


def test_exports_to_one_folder_do_not_disturb_each_other(tmp_path):
    """The second begins and ends while the first is at work; the first then says so and leaves nothing."""

    def tensors():
        yield "a", np.ones(1000, np.float32)
        write_folder(tmp_path / "m", [("a", np.zeros(3, np.float32))], {})
        yield "b", np.ones(1000, np.float32)

    with pytest.raises(CheckpointFilesError, match="another export to this folder was complete first"):
        write_folder(tmp_path / "m", tensors(), {}, max_shard_bytes=4000)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    np.testing.assert_array_equal(WeightFiles(tmp_path / "m").read("a"), np.zeros(3))


def test_an_export_is_readable_like_any_other_folder(tmp_path):
    write_folder(tmp_path / "m", TENSORS.items(), {})
    (tmp_path / "other").mkdir()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_files, "_assemble", full)
    with pytest.raises(CheckpointFilesError, match=r"disk .*full"):
        write_folder(tmp_path / "m", TENSORS.items(), {})
    assert list(tmp_path.iterdir()) == []


def test_existing_folders(tmp_path):
    write_folder(tmp_path, TENSORS.items(), {})  # empty: taken
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointFilesError, match="not empty; choose another folder"):
        write_folder(tmp_path, [("w", np.ones(2))], {})
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("tensors", "encode", "message"),
    [
        ([("w", np.ones(2)), ("w", np.ones(3))], None, "'w' comes twice"),
        ([("w", np.ones(2, np.complex128))], None, "'w'.*complex128"),
        ([("w", np.full((2, 2), np.inf))], as_fp8, "'w'.*NaN or infinite"),
    ],
)
def test_tensors_that_cannot_be_written(tmp_path, tensors, encode, message):
    with pytest.raises(CheckpointFilesError, match=message):
        write_folder(tmp_path / "m", tensors, {}, encode=encode)
    assert list(tmp_path.iterdir()) == []


# Memory


# Linux counts pages of a mapped file as resident too, but drops them when memory is short; what a program holds for
# good is RssAnon. A thread watches it while tensors are made, written, and read in slices that are copied, as placing
# them on devices does.
MEMORY = """
import sys, threading, time
import numpy as np, ml_dtypes
from moe_jax.interop.low_bits import LowBits, encoded
from moe_jax.interop.weight_files import WeightFiles, write_folder

folder, total, largest, use_fp8 = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fp8"

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
threading.Thread(target=watch, daemon=True).start()

def measure(what, work):
    global peak
    base = peak = anonymous()
    seconds = time.perf_counter()
    work()
    print(what, peak - base, round(time.perf_counter() - seconds, 2), flush=True)

def tensors():
    for i in range(total // largest):
        yield f"w{i}.weight", np.full((1024, largest // 2048), i % 7, ml_dtypes.bfloat16)

def read():
    files = WeightFiles(folder)
    for name in files.names:
        columns = files.shape(name)[1]
        for part in (slice(0, columns // 3), slice(columns // 3, columns)):
            np.array(files.read(name, (slice(None), part)))

encode = (lambda name, w: encoded(name, w, LowBits("fp8"), None, None)) if use_fp8 else None
measure("write", lambda: write_folder(folder, tensors(), {}, max_shard_bytes=3 * largest, encode=encode))
measure("read", read)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_memory_stays_below_twice_the_largest_tensor(tmp_path, kind):
    largest = 64 * 2**20  # several times the 16 MiB in which bytes are moved
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "m"), str(6 * largest), str(largest), kind]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    peaks = {line.split()[0]: int(line.split()[1]) for line in lines}
    # A reader of FP8 weights gets float32, which is twice the bfloat16 that was written.
    limits = {"write": 2 * largest, "read": 2 * largest if kind == "bfloat16" else 4 * largest}
    for what, limit in limits.items():
        assert largest // 4 < peaks[what] < limit, peaks
