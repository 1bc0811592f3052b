"""Planning by compiling: what needs no TPU compiler is tested always, the compiler where libtpu is installed."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import pytest
from jax.experimental import topologies

from launch import compile as plan
from launch import estimate
from moe_jax.analysis import cost

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[tpu]'")
LITE = ("--preset", "deepseek_v2_lite", "--topology", "v5p:2x2x1")


def test_without_libtpu_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert plan.main([*LITE, "--batch", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install -e '.[tpu]'" in error


def test_search_ranks_what_fits_first_and_fastest():
    config = estimate.parse(plan.Config, [*LITE, "--batch", "8", "--search"], None)
    ranked = plan.search(config)
    fits = [figures["fits"] for _, figures in ranked]
    assert fits == sorted(fits, reverse=True)
    speeds = [figures["tokens_per_second"] for _, figures in ranked if figures["fits"]]
    assert speeds == sorted(speeds, reverse=True)
    tried = {(c.mesh.fsdp, c.mesh.expert, c.mesh.tensor, c.model.remat, c.accumulation_steps) for c, _ in ranked}
    assert len(tried) == len(ranked) and {t[3] for t in tried} == {"block", "dots", "none"}
    assert all(fsdp * expert * tensor == 4 for fsdp, expert, tensor, _, _ in tried)
    assert {t[4] for t in tried} == {1, 2, 4, 8}  # 8 micro-batches of one row need two tensor shards or more


def test_a_search_without_any_mesh_is_refused(capsys):
    assert plan.main(["--topology", "v5p:4x4x4", "--batch", "3", "--search"]) == 2
    assert "no mesh divides --batch 3" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("--decode", "--context", "256")])
def test_a_small_model_compiles_for_tpus_and_its_state_is_the_estimate_s(capsys, mode):
    arguments = ("--preset", "tiny_moe", "--topology", "v5p:2x2x1", "--mesh.fsdp", "2", "--mesh.expert", "2")
    arguments += ("--batch", "8", "--seq", "128", "--json", *mode)
    assert plan.main(list(arguments)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["bound_by"] in ("compute", "hbm", "interconnect")
    assert any("fsdp" in name for name in found["collective_bytes_per_device"])
    assert any("expert" in name for name in found["collective_bytes_per_device"])
    if not mode:
        exact = estimate.estimate(estimate.parse(plan.Config, list(arguments), None))["memory_per_chip"]
        assert found["memory_per_chip"]["parameters"] == exact["parameters"]
        assert found["memory_per_chip"]["optimizer"] == pytest.approx(exact["optimizer"], rel=0.05)


def test_the_two_cores_of_a_v4_chip_are_asked_for_as_one_device(monkeypatch):
    asked = {}

    def describe(*, topology_name, **options):
        asked[topology_name] = options
        return SimpleNamespace(devices=[])

    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    for topology in ("v4:2x2x1", "v5p:2x2x1"):
        plan.topology_devices(topology)
    assert asked["v4:2x2x1"] == {"platform": "tpu", "chip_config_name": "megacore"}
    assert asked["v5p:2x2x1"] == {"platform": "tpu"}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_libtpu_counts_the_devices_of_a_chip_as_the_table_of_hardware_does(topology):
    assert len(plan.topology_devices(topology)) == cost.parse_hardware(topology).devices


@needs_libtpu
@pytest.mark.slow
def test_a_mesh_that_the_torus_has_no_dimensions_for(capsys):
    assert (
        plan.main(["--preset", "tiny_moe", "--topology", "v5p:4x4x4", "--mesh.fsdp", "32", "--mesh.expert", "2"]) == 2
    )
    assert "product of some dimensions" in capsys.readouterr().err


def test_config_of_compile_is_that_of_estimate():
    ours = {field.name for field in dataclasses.fields(plan.Config)}
    assert ours - {field.name for field in dataclasses.fields(estimate.Config)} == {"search", "search_compile"}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "precision", "kind"), [("tpu7x:2x2x1", "fp8", "f8e4m3fn"), ("v6e:2x2", "int8", "s8")]
)
def test_the_blocks_products_are_in_8_bits(capsys, topology, precision, kind):
    """Forward and backward, experts and prediction module too. Scores, router and head are not theirs."""
    arguments = ("--preset", "tiny_moe", "--topology", topology, "--mesh.fsdp", "2", "--mesh.expert", "2")
    arguments += ("--mesh.data", "-1", "--batch", "8", "--seq", "128", "--precision", precision, "--json")
    assert plan.main(list(arguments)) == 0
    found = json.loads(capsys.readouterr().out)
    wide = ("attention_scores", "router", "token_logprobs")
    rows = [row for row in found["products"] if not any(part in row["place"] for part in wide)]
    assert {"attention", "ffn", "ffn/experts", "ffn/shared_experts"} <= {row["place"] for row in rows}
    assert [row for row in rows if row["operands"] != f"{kind} x {kind}"] == []
    assert 0.6 < found["flops_share_in_8_bits"] < 1
