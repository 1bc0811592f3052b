"""The benchmark of GRPO: what is counted is right, and what is reported fits together. Times are not tested."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moe_jax.__main__ import main
from moe_jax.analysis.flops import parameter_counts, training_flops_per_token
from moe_jax.benchmarks import grpo as benchmark
from moe_jax.benchmarks.grpo import GRPOBenchmark, benchmark_grpo, dense_model, phase_flops, table
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.ops import token_logprobs as logprobs_op
from moe_jax.ops.token_logprobs import token_logprobs

TINY = ModelConfig(
    vocab_size=ByteTokenizer().vocab_size,
    hidden_size=8,
    num_layers=1,
    intermediate_size=8,
    attention=AttentionConfig(kind="gqa", num_heads=1, num_kv_heads=1, head_dim=8),
    moe=MoEConfig(),
)
CONFIG = GRPOBenchmark(
    prompts=2,
    group_size=2,
    completion_tokens=4,
    prompt_lengths=(3, 5),
    share_prompts=(True, False),
    repeats=1,
    model=TINY,
    stop_tokens=100,
    compactions=1,
)


@pytest.fixture(scope="module")
def results():
    return benchmark_grpo(CONFIG)


def test_the_model_is_the_peers():
    assert parameter_counts(dense_model()).total == pytest.approx(5.25e6, rel=2e-3)


def test_flops_are_those_of_the_tokens_that_are_read():
    config = dataclasses.replace(CONFIG, model=dense_model(), prompts=1, group_size=2, completion_tokens=8)
    alone = phase_flops(config, 8, share_prompts=False, drawn=16)
    head = 2 * dense_model().vocab_size * dense_model().hidden_size
    # Two rows of 16 tokens, of which the head reads 8; that count takes half of the square of scores, not its diagonal.
    expected = 2 * 16 * training_flops_per_token(dense_model(), 17) // 3 - 2 * 8 * head
    assert alone["reference"] == pytest.approx(expected, rel=1e-6)
    assert alone["update"] == pytest.approx(3 * alone["reference"], rel=1e-6)
    shared = phase_flops(config, 8, share_prompts=True, drawn=16)
    assert shared["reference"] / alone["reference"] == pytest.approx(24 / 32, rel=0.02)
    assert shared["generate"] == shared["reference"] == alone["generate"]
    assert phase_flops(dataclasses.replace(config, beta=0.0), 8, False, 16)["reference"] == 0


def test_results_fit_together(results):
    assert [(step.prompt_length, step.share_prompts) for step in results.steps] == [
        (3, True),
        (3, False),
        (5, True),
        (5, False),
    ]
    for step in results.steps:
        assert [phase.name for phase in step.phases] == ["generate", "score", "reference", "update"]
        assert 0 < sum(phase.seconds for phase in step.phases) <= step.seconds * 1.001
        assert 2 * 2 <= step.completion_tokens <= 2 * 2 * 4
    row = json.loads(json.dumps(results.to_json()))["steps"][0]
    assert row["completion_tokens_per_s"] == pytest.approx(row["completion_tokens"] / row["seconds"])
    assert 0 < row["of_matrix_rate"] < 1


def test_the_table_shows_every_phase(results):
    shown = table(results)
    for text in ("3, shared", "5, not shared", "reference", "of rate", "completion tokens/s"):
        assert text in shown


def test_mistakes_are_said_before_anything_is_measured():
    with pytest.raises(ConfigError, match="group_size = 1: must be at least 2"):
        GRPOBenchmark(group_size=1)
    with pytest.raises(ConfigError, match="prompt_lengths"):
        GRPOBenchmark(prompt_lengths=(1,))
    with pytest.raises(ConfigError, match="stop_tokens = 264"):
        GRPOBenchmark(stop_tokens=264)


def test_json_alone_is_printed(results, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "benchmark_grpo", lambda config: results)
    assert main(["benchmark", "grpo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][3]["share_prompts"] is False


def test_memory_does_not_grow_with_vocabulary_times_length(monkeypatch):
    """Log-probabilities and their gradient need room for a chunk of logits, whatever the length."""
    monkeypatch.setattr(logprobs_op, "_BLOCK_ELEMENTS", 2**16)
    V, D = 2048, 8

    def temporaries(length):
        def loss(hidden, head):
            targets = np.zeros(hidden.shape[:2], np.int32)
            return token_logprobs(hidden, head, targets, with_entropy=True).logprobs.sum()

        hidden, head = jax.ShapeDtypeStruct((1, length, D), "float32"), jax.ShapeDtypeStruct((D, V), "float32")
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(256), temporaries(4096)
    assert long - short < 4096 * V * 4 / 20
