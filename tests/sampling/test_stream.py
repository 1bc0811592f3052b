"""Streaming: the same tokens as `generate`, one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, SamplingConfig
from moe_jax.model.definition import Definition
from moe_jax.sampling.sampler import generate
from moe_jax.sampling.stream import Stream

MLA = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    num_layers=1,
    first_k_dense=0,
    intermediate_size=32,
    attention=AttentionConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, num_shared_experts=1, expert_size=16),
    max_position=96,
)
GQA = dataclasses.replace(
    MLA, attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=8), moe=MoEConfig()
)
PAD = 0


def model_of(cfg: ModelConfig):
    """A model with weights of size 0.4: confident enough that no two tokens are nearly tied."""
    definition = Definition.of(cfg)
    rng = np.random.default_rng(0)
    arrays = {name: jnp.array(rng.normal(0, 0.4, v.shape), v.dtype) for name, v in definition.variables.items()}
    params = {name: arrays.pop(name) for name in definition.param_names}
    return definition, params, arrays


def check_against_generate(model, cfg: SamplingConfig, stop_ids: tuple[int, ...], length: int) -> list[list[int]]:
    definition, params, rest = model
    stream = Stream(definition, params, rest, cfg, stop_ids=stop_ids, pad_id=PAD)
    tokens_PS = jax.random.randint(jax.random.key(0), (1, length), 1, 24)

    @jax.jit
    def whole(key):
        model = definition.merge(params, rest)
        return generate(model, tokens_PS, tokens_PS > 0, key, cfg, stop_ids=stop_ids, pad_id=PAD)

    completions = []
    for seed in range(6):
        completions.append(list(stream(tokens_PS[0].tolist(), jax.random.key(seed))))
        samples = jax.device_get(whole(jax.random.key(seed)))
        assert completions[-1] == samples.tokens_BN[samples.mask_BN].tolist()
        assert PAD not in completions[-1]
    return completions


def test_sampled_tokens_are_those_of_generate():
    completions = check_against_generate(
        model_of(MLA), SamplingConfig(12, temperature=0.8, top_k=10), stop_ids=(3,), length=70
    )
    assert any(tokens[-1] == 3 for tokens in completions)
    assert all(len(tokens) == 12 or tokens[-1] == 3 for tokens in completions)


def test_greedy_tokens_are_those_of_generate():
    completions = check_against_generate(model_of(GQA), SamplingConfig(12, temperature=0), stop_ids=(), length=3)
    assert all(completion == completions[0] for completion in completions)


@pytest.fixture(scope="module")
def stream():
    definition, params, rest = model_of(GQA)
    return Stream(definition, params, rest, SamplingConfig(12), stop_ids=(), pad_id=PAD)


@pytest.mark.parametrize("room", [1, 2, 12])
def test_a_pass_is_asked_for_before_the_last_ones_token_is_read(monkeypatch, stream, room):
    """And none that nothing is asked of."""
    asked, step = [], stream._step
    monkeypatch.setattr(stream, "_step", lambda *arguments: asked.append(1) or step(*arguments))
    monkeypatch.setattr(stream, "cfg", SamplingConfig(room))
    tokens = stream([5] * 3, jax.random.key(0))
    next(tokens)
    assert len(asked) == min(1, room - 1)
    assert len(list(tokens)) == room - 1 == len(asked)


def test_tokens_come_one_by_one(stream):
    tokens = stream([5] * 70, jax.random.key(0))
    first = next(tokens)
    assert [first, *tokens] == list(stream([5] * 70, jax.random.key(0)))


def test_a_full_context_ends_the_completion(stream):
    assert [len(list(stream([4] * length, jax.random.key(0)))) for length in (84, 85, 90, 95)] == [12, 11, 6, 1]


def test_prompts_without_room_are_refused_at_once(stream):
    with pytest.raises(ValueError, match=r"the prompt has 96 tokens and the model's context 96"):
        stream([4] * 96, jax.random.key(0))
    with pytest.raises(ValueError, match="empty prompt"):
        stream([], jax.random.key(0))
