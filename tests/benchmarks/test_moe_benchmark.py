"""The benchmark: routings are what they claim, FLOPs are right, and what is reported fits together. Times are not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.__main__ import main
from moe_jax.analysis.flops import parameter_counts
from moe_jax.benchmarks import moe as benchmark
from moe_jax.benchmarks.moe import FullStep, MoEBenchmark, benchmark_moe, dense_equal
from moe_jax.benchmarks.moe_report import plot_moe, table
from moe_jax.benchmarks.routings import assign, expert_counts, expert_loads, load_profile
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from moe_jax.presets import v3_34m

D, F, K, T = 16, 8, 2, 64
TINY_MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=1,
    first_k_dense=0,
    attention=AttentionConfig(kind="gqa", num_heads=2, num_kv_heads=2, head_dim=8),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, expert_size=16),
)
TINY = MoEBenchmark(D, F, (8,), K, T, routing=("balanced", "worst"), repeats=2, step=FullStep(TINY_MODEL, 2, 8))


@pytest.fixture(scope="module")
def results():
    return benchmark_moe(TINY)


def max_violation(counts_E):
    return np.max(counts_E) / np.mean(counts_E) - 1


@pytest.mark.parametrize("E", [6, 8, 64, 256])
def test_routings_have_the_imbalance_that_they_claim(E):
    counts = {
        name: expert_counts(expert_loads(name, E, 6, None, 0), 512, 6) for name in ("balanced", "measured", "worst")
    }
    assert all(np.sum(counts_E) == 512 * 6 and np.max(counts_E) <= 512 for counts_E in counts.values())
    assert max_violation(counts["balanced"]) == 0
    np.testing.assert_array_equal(counts["worst"], np.where(np.arange(E) < 6, 512, 0))
    assert max_violation(counts["worst"]) == pytest.approx(E / 6 - 1)
    if E >= 64:
        assert 1 < max_violation(counts["measured"]) < 2
    for counts_E in counts.values():
        experts_TK = assign(counts_E, 512, np.random.default_rng(0))
        np.testing.assert_array_equal(np.bincount(experts_TK.ravel(), minlength=E), counts_E)
        assert all(len(set(row)) == 6 for row in experts_TK.tolist())


def test_assignments_are_mixed():
    experts_TK = assign(np.full(32, 64), 512, np.random.default_rng(0))
    pairs = {tuple(sorted(row)) for row in experts_TK.tolist()}
    assert len(pairs) > 150  # of 512 tokens' sets of 4; unmixed there are 8
    first = experts_TK[:, 0]
    assert np.mean(first[1:] == first[:-1]) < 0.2  # neighbours are unrelated


def test_a_run_s_loads_keep_their_shape_at_other_numbers_of_experts():
    counts_LE = np.array([[10, 30, 20, 40], [40, 20, 10, 30]])
    profile = load_profile(counts_LE)
    np.testing.assert_allclose(profile, [0.4, 0.8, 1.2, 1.6])
    for E, expected in [(4, 0.6), (32, 0.6)]:
        counts_E = expert_counts(expert_loads("measured", E, 2, profile, 0), 1000, 2)
        assert max_violation(counts_E) == pytest.approx(expected, abs=0.05)
    collapsed = (0.0, 0.0, 0.0, 4.0)
    counts_E = expert_counts(expert_loads("measured", 4, 3, collapsed, 0), 100, 3)
    assert np.sum(counts_E) == 300 and np.max(counts_E) == 100


def test_every_contender_is_timed(results):
    found = {(t.contender, t.passes, t.experts, t.routing) for t in results.timings}
    both = ("forward", "forward_backward")
    expected = {(name, passes, None, None) for name in ("dense", "product") for passes in both}
    expected |= {("batched", passes, 8, None) for passes in both}
    expected |= {(name, "step", None, None) for name in ("moe_step", "dense_step")}
    for routing in ("balanced", "worst"):
        expected |= {(name, passes, 8, routing) for name in ("moe", "grouped") for passes in both}
        expected.add(("ragged", "forward_backward", 8, routing))
    assert found == expected and len(results.timings) == len(expected)
    assert results.notes == ()
    for t in results.timings:
        assert 0 < t.min_s <= t.median_s and t.repeats == 2
    assert results.find("moe", "forward", 8, "worst").max_violation == pytest.approx(3)
    assert results.find("grouped", "forward", 8, "balanced").max_violation == 0
    assert results.find("moe_step", "step").max_violation >= 0
    assert results.find("dense_step", "step").max_violation is None


def test_ratios_and_rates_follow_from_the_times(results):
    rows = T * K
    dense, product = 2 * T * D * 3 * K * F, 2 * rows * D * 2 * F
    references = {
        "moe": "dense",
        "batched": "dense",
        "grouped": "product",
        "ragged": "product",
        "moe_step": "dense_step",
    }
    for t in results.timings:
        reference = results.find(references.get(t.contender, t.contender), t.passes)
        assert t.ratio == pytest.approx(t.median_s / reference.median_s)
        if t.passes == "step":
            assert t.tokens_per_s == pytest.approx(16 / t.median_s)
            continue
        forward = dense if t.contender in ("moe", "dense", "batched") else product
        flops = forward * (1 if t.passes == "forward" else 3)
        assert t.gflops_per_s == pytest.approx(flops / t.median_s / 1e9)
        assert t.tokens_per_s == pytest.approx(T / t.median_s)


def test_the_layer_works_on_the_prescribed_experts_and_pays_for_its_router():
    E = 8
    routing = np.tile(np.array([5, 2], np.int32), (T, 1))
    config = MoEBenchmark(D, F, (E,), K, T, routing=("worst",), step=None)
    contenders = benchmark._layer_contenders(config, {(E, "worst"): routing})
    timed = next(c.run for c in contenders if (c.name, c.passes) == ("moe", "forward_backward"))
    y_BSD, stats, (params, dx_BSD) = timed()
    np.testing.assert_array_equal(stats.counts_BE[0], T * np.isin(np.arange(E), [5, 2]))
    assert np.all(np.any(y_BSD != 0, axis=-1)) and np.all(np.any(dx_BSD != 0, axis=-1))
    used_E = np.any(params["experts"]["gate_up_ED2F"][...] != 0, axis=(1, 2, 3))
    np.testing.assert_array_equal(used_E, np.isin(np.arange(E), [5, 2]))
    assert np.any(params["router"]["gate_DE"][...] != 0)
    compiled = timed.func.lower(*timed.args).compile().as_text()
    assert "topk" in compiled.lower()  # the router's own choice is not left out


def test_batched_experts_do_the_work_of_all_rows():
    E, C = 8, T * K // 8
    config = MoEBenchmark(D, F, (E,), K, T, routing=("worst",), step=None)
    contenders = benchmark._layer_contenders(config, {(E, "worst"): np.zeros((T, K), np.int32)})
    timed = next(c.run for c in contenders if (c.name, c.passes) == ("batched", "forward_backward"))
    (gate_up_EDF, down_EFD), x_ECD, _ = timed.args
    y_ECD, _, gradients = timed()
    assert x_ECD.shape == (E, C, D)
    for e in range(E):
        gate, up = jnp.split(x_ECD[e] @ gate_up_EDF[e], 2, axis=-1)
        np.testing.assert_allclose(y_ECD[e], (jax.nn.silu(gate) * up) @ down_EFD[e], rtol=1e-4, atol=1e-4)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, ((gate_up_EDF, down_EFD), x_ECD))
    assert all(np.all(np.any(g != 0, axis=(1, 2))) for g in jax.tree.leaves(gradients))


def test_the_dense_equal_has_the_active_parameters():
    sparse = v3_34m()
    assert parameter_counts(sparse).total == pytest.approx(34e6, rel=0.01)
    dense = parameter_counts(dense_equal(sparse))
    assert dense.total == dense.active
    assert dense.active == pytest.approx(parameter_counts(sparse).active, abs=3 * 256 * 6 / 2)


def test_ragged_dot_is_left_out_where_it_would_take_long(monkeypatch):
    monkeypatch.setattr(benchmark, "RAGGED_FLOP_LIMIT", 5 * 6 * T * K * D * 2 * F)
    config = MoEBenchmark(D, F, (4, 8), K, T, routing=("balanced",), repeats=1, step=None)
    notes: list[str] = []
    routings = {(E, "balanced"): np.zeros((T, K), np.int32) for E in (4, 8)}
    contenders = list(benchmark._product_contenders(config, routings, notes))
    assert {c.experts for c in contenders if c.name == "ragged"} == {4}
    assert len(notes) == 1 and "8 experts" in notes[0]


def test_table_and_plot(results, tmp_path):
    text = table(results)
    assert "MaxVio" in text and "tokens/s" in text and jax.__version__ in text
    rows = [line.split()[:2] for line in text.splitlines()]
    assert ["8", "batched"] in rows and ["8", "balanced"] in rows
    plot_moe(results, tmp_path / "new" / "moe.png")
    assert (tmp_path / "new" / "moe.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_json_alone_and_writes_the_plot(results, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "benchmark_moe", lambda config: asked.append(config) or results)
    plot = tmp_path / "moe.png"
    arguments = ["benchmark", "moe", "--experts", "4", "8", "--experts-per-token", "2", "--plot", str(plot)]
    assert main([*arguments, "--json", "--no-full-step"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["timings"]) == len(results.timings)
    assert all(timing["median_s"] > 0 and timing["ratio"] > 0 for timing in found["timings"])
    assert found["environment"]["cores"] >= 1
    assert plot.stat().st_size > 0
    assert asked[0].experts == (4, 8) and asked[0].step is None and asked[0].load_profile is None
    assert main(arguments) == 0
    assert asked[1].step is not None
    assert str(plot) in capsys.readouterr().out


def test_mistakes_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="none may be less than experts_per_token = 6"):
        MoEBenchmark(experts=(4,))
    with pytest.raises(ConfigError, match="repeats = 0"):
        MoEBenchmark(repeats=0)
    with pytest.raises(ConfigError, match="each once"):
        MoEBenchmark(experts=(8, 8))
    assert main(["benchmark", "moe", "--plot", str(tmp_path / "a.txt")]) == 2
    assert "must be a .png file" in capsys.readouterr().err
    assert main(["benchmark", "moe", "--routing", "worst", "--run", str(tmp_path)]) == 2
    assert "add measured to --routing" in capsys.readouterr().err
    assert main(["benchmark", "moe", "--run", str(tmp_path / "absent"), "--plot", str(tmp_path / "a.png")]) == 2
    assert "absent is not the folder of a run" in capsys.readouterr().err
