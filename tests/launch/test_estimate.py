"""The estimator closes on what DeepSeek published, and its counts are those of the arrays."""

import json
import math

import jax
import pytest

from launch.estimate import main
from moe_jax import presets
from moe_jax.analysis.workload import mesh_sizes, training_workload, weights
from moe_jax.config import ConfigError, MeshConfig
from moe_jax.model.definition import Definition
from moe_jax.sharding import make_mesh

KEYS = {
    "parameters_total",
    "parameters_active",
    "parameters_active_non_embedding",
    "training_flops_per_token",
    "kv_cache_bytes_per_token",
    "bytes_per_chip",
    "step_seconds",
    "bound_by",
    "mfu",
    "chip_hours",
    "dollars",
}


def figures(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_deepseek_v3_closes_on_its_report(capsys):
    mfu = str(385 / 989)
    v3 = ("--preset", "deepseek_v3", "--chip", "h800", "--chips", "2048", "--tokens", "14.8e12", "--mfu", mfu)
    found = figures(capsys, *v3)
    assert set(found) >= KEYS
    assert found["parameters_total"] == 671_026_419_200
    assert found["training_flops_per_token"] == pytest.approx(250e9, rel=0.003)
    assert found["kv_cache_bytes_per_token"] == 70_272
    assert 2.66e6 <= found["chip_hours"] <= 2.69e6
    whole = figures(capsys, *v3, "--extra-chip-hours", "124e3")
    assert whole["dollars"] == pytest.approx(5.576e6, rel=0.006)
    assert figures(capsys, *v3, "--price", "3")["dollars"] == pytest.approx(1.5 * found["dollars"])


def test_deepseek_v2_s_flops(capsys):
    found = figures(capsys, "--preset", "deepseek_v2", "--topology", "v5p:4x4x4")
    assert found["training_flops_per_token"] == pytest.approx(155e9, rel=0.003)


def test_the_step_is_the_largest_of_its_times(capsys):
    found = figures(capsys, "--preset", "deepseek_v2_lite", "--topology", "v5p:2x2x1")
    times = found["roofline_seconds"]
    assert found["bound_by"] == max(times, key=times.get)
    assert found["step_seconds"] == max(times.values())
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * found["training_flops_per_token"] / (4 * 459e12))
    assert found["fits"] and found["bytes_per_chip"] == pytest.approx(sum(found["memory_per_chip"].values()))


def test_decoding_reads_the_cache(capsys):
    decode = ("--preset", "deepseek_v2_lite", "--topology", "v6e:2x2", "--decode", "--batch", "64")
    short, long = (figures(capsys, *decode, "--context", n) for n in ("1024", "8192"))
    assert short["memory_per_chip"]["activations"] == 16 * 1024 * 31_104
    grown = long["roofline_seconds"]["hbm"] - short["roofline_seconds"]["hbm"]
    assert grown == pytest.approx(16 * 7168 * 31_104 / 1638e9)


def test_a_preset_is_enough(capsys):
    found = figures(capsys, "--preset", "deepseek_v2_lite")
    assert found["chips"] == 8 and found["parameters_total"] == 15_706_484_224


def test_a_table_for_people(capsys):
    assert main(["--preset", "deepseek_v3", "--topology", "tpu7x:4x4x4", "--mesh.fsdp", "128"]) == 0
    text = capsys.readouterr().out
    assert "671.026 B" in text and "give --price" in text and "bound by" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v5p:2x2x1", "--batch", "3"), "--batch: 3 rows"),
        (("--topology", "v5p:2x2x1", "--mesh.fsdp", "8"), "8 devices and the hardware 4"),
        (("--topology", "v9:2x2"), "no chip is named"),
        (("--preset", "deepsek_v3"), "deepseek_v3"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(list(arguments)) == 2
    assert message in capsys.readouterr().err


def test_weights_are_those_that_a_mesh_of_devices_holds():
    cfg, sizes = presets.tiny_moe(), mesh_sizes(MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 8)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    definition = Definition.of(cfg)
    params, _ = definition.init(jax.random.key(0), mesh)
    held = sum(math.prod(array.sharding.shard_shape(array.shape)) for array in params.values())
    found = weights(cfg, sizes)
    assert sum(weight.held for weight in found) == held
    assert sum(weight.elements for weight in found) == sum(array.size for array in params.values())
    work = training_workload(cfg, sizes, 8, 64)
    assert (work.memory.parameters, work.memory.optimizer) == (4 * held, 8 * held)
    with pytest.raises(ConfigError, match="choose a multiple"):
        training_workload(cfg, sizes, 6, 64)


def test_eight_bits_shorten_computing_where_the_chip_has_units_for_them(capsys):
    """Of V3's products all but head, router and scores: at most twice as fast, and not at all on a chip without."""

    def compute(topology, quantization):
        arguments = ("--preset", "deepseek_v3", "--topology", topology, "--mesh.fsdp", "-1", "--batch", "512")
        found = figures(capsys, *arguments, "--model.quantization", quantization)
        return found["roofline_seconds"]["compute"]

    for topology, quantization, low, high in (
        ("tpu7x:4x4x8", "fp8", 1.5, 2.0),
        ("v6e:16x16", "int8", 1.5, 2.0),
        ("v6e:16x16", "fp8", 1.0, 1.0),
        ("v5p:4x4x8", "int8", 1.0, 1.0),
    ):
        assert low <= compute(topology, "none") / compute(topology, quantization) <= high


@pytest.mark.parametrize(
    ("preset", "topology", "mesh", "batch", "gigabytes"),
    [
        ("deepseek_v3", "v5p:4x8x16", (64, 8, 1), 512, 61.2),
        ("deepseek_v3", "v5p:4x8x16", (16, 8, 4), 128, 45.3),
        ("deepseek_v3", "tpu7x:8x8x8", (128, 8, 1), 2048, 137.4),
        ("deepseek_v2_lite", "v5p:2x2x1", (4, 1, 1), 4, 73.1),
        ("deepseek_v2_lite", "v6e:4x4", (4, 4, 1), 16, 24.9),
        ("deepseek_v2_lite", "v4:2x2x4", (4, 4, 1), 16, 25.0),
        ("deepseek_v2_lite", "v4:2x4x4", (32, 1, 1), 32, 12.9),
    ],
)
def test_memory_is_near_what_the_tpu_compiler_said(capsys, preset, topology, mesh, batch, gigabytes):
    """Recorded from launch.compile, whose programs these are, as launch/estimate.py has them in its table."""
    sizes = [f"--mesh.{name}={size}" for name, size in zip(("fsdp", "expert", "tensor"), mesh, strict=True)]
    found = figures(capsys, "--preset", preset, "--topology", topology, *sizes, "--batch", str(batch))
    assert found["bytes_per_chip"] == pytest.approx(gigabytes * 1e9, rel=0.08)


def test_moments_in_bfloat16_take_half(capsys):
    adamw = ("--preset", "deepseek_v2_lite", "--topology", "v5p:2x2x1", "--optimizer.beta2", "0.95")
    whole, half = (
        figures(capsys, *adamw, "--optimizer.moment-dtype", dtype)["memory_per_chip"]["optimizer"]
        for dtype in ("float32", "bfloat16")
    )
    assert half == whole / 2
