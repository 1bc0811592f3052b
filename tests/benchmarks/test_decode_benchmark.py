"""The benchmark: what is counted is right, and what is reported fits together. Times are not tested."""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.__main__ import main
from moe_jax.benchmarks import decode as benchmark
from moe_jax.benchmarks.decode import (
    DecodeBenchmark,
    benchmark_decode,
    bytes_per_token,
    dense_model,
    sparse_model,
    table,
)
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, MTPConfig
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.model.definition import Definition

TINY = ModelConfig(
    vocab_size=ByteTokenizer().vocab_size,
    hidden_size=8,
    num_layers=1,
    intermediate_size=8,
    attention=AttentionConfig(kind="gqa", num_heads=1, num_kv_heads=1, head_dim=8),
    moe=MoEConfig(),
    mtp=MTPConfig(depth=1),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    weights = tmp_path_factory.mktemp("decode") / "weights.npz"
    config = DecodeBenchmark(
        tokens=3,
        repeats=1,
        context=16,
        drafts=(2,),
        prompts=1,
        train_minutes=1e-6,
        weights=weights,
        plain={"tiny": TINY},
        speculative=TINY,
    )
    first = benchmark_decode(config)
    with np.load(weights) as file:
        assert set(file) == set(Definition.of(TINY).variables)
    return first


def test_bytes_are_those_of_the_weights_that_a_token_meets():
    cfg = dense_model()
    shapes = [v.shape for name, v in Definition.of(cfg).variables.items() if not name.startswith(("mtp", "embed"))]
    assert bytes_per_token(cfg) == 4 * sum(int(np.prod(shape)) for shape in shapes)
    tied = dataclasses.replace(cfg, tie_word_embeddings=True)
    assert bytes_per_token(tied) == bytes_per_token(cfg)
    # Of 64 experts a token meets 6, and the shared one.
    moe = sparse_model()
    fewer = dataclasses.replace(moe, moe=dataclasses.replace(moe.moe, num_experts=8))
    gates = 4 * moe.num_moe_layers * (64 - 8) * (moe.hidden_size + 1)
    assert bytes_per_token(moe) - bytes_per_token(fewer) == gates


def test_the_models_are_past_the_caches():
    assert bytes_per_token(dense_model()) > 120e6 and bytes_per_token(sparse_model()) > 120e6


def test_results_fit_together(results):
    (plain,) = results.plain
    assert plain.bound_tokens_per_s == pytest.approx(1e3 * results.gigabytes_per_s / plain.megabytes_per_token)
    assert plain.of_bound == pytest.approx(plain.tokens_per_s / plain.bound_tokens_per_s)
    one_by_one, drafted = results.speculative
    assert (one_by_one.drafts, one_by_one.speed_up, one_by_one.acceptance) == (0, 1, {})
    assert drafted.speed_up == pytest.approx(drafted.tokens_per_s / one_by_one.tokens_per_s)
    assert 1 <= drafted.acceptance["tokens_per_pass"] <= 3
    assert results.training["steps"] == 1
    assert [form.cache_bytes_per_token for form in results.attention] == [640, 640, 4 * 8 * (64 + 32 + 64)]
    assert json.loads(json.dumps(results.to_json()))["plain"][0]["of_bound"] == plain.of_bound


def test_the_table_shows_every_row(results):
    shown = table(results)
    for text in ("tiny", "absorbed", "expanded at every step", "tokens a pass", "kept 2", "trained here: 1 steps"):
        assert text in shown


def test_mistakes_are_said_before_anything_is_measured(capsys, tmp_path):
    with pytest.raises(ConfigError, match="tokens = 1: must be at least 2"):
        DecodeBenchmark(tokens=1)
    with pytest.raises(ConfigError, match="drafts"):
        DecodeBenchmark(drafts=())
    assert main(["benchmark", "decode", "--weights", str(tmp_path / "w.bin")]) == 2
    assert ".npz" in capsys.readouterr().err
    assert main(["benchmark", "decode", "--weights", str(tmp_path / "w.npz")]) == 2
    assert "--train-minutes" in capsys.readouterr().err


def test_json_alone_is_printed(results, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "benchmark_decode", lambda config: results)
    assert main(["benchmark", "decode", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speculative"][1]["drafts"] == 2
