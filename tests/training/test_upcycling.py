"""Dense models as sparse ones: the same logits at the first step, through the tool and after export; then it learns."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moe_jax.__main__ import main
from moe_jax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig, MTPConfig, RoPEConfig
from moe_jax.data.tokenizer import HFTokenizer
from moe_jax.interop.byte_tokenizer import write_byte_tokenizer
from moe_jax.interop.pretrained import Pretrained, load_pretrained, save_pretrained
from moe_jax.model.definition import Definition
from moe_jax.sharding import make_mesh
from moe_jax.training.supervised import make_loss, make_totals
from moe_jax.training.upcycling import upcycle, upcycled_config

GQA = AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=16, rope=RoPEConfig(theta=1e4))
LLAMA = ModelConfig(
    vocab_size=265, hidden_size=32, num_layers=2, intermediate_size=48, attention=GQA, initializer_range=0.1
)
MODELS = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, attention=dataclasses.replace(GQA, qkv_bias=True), tie_word_embeddings=True),
    "qwen3": dataclasses.replace(LLAMA, attention=dataclasses.replace(GQA, qk_norm="head")),
    "mla-mtp": ModelConfig(
        vocab_size=265,
        hidden_size=32,
        num_layers=2,
        intermediate_size=48,
        initializer_range=0.1,
        attention=AttentionConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
        mtp=MTPConfig(depth=1),
    ),
}
TOKENS = np.random.default_rng(0).integers(9, 265, (4, 16)).astype(np.int32)


def dense(name):
    definition = Definition.of(MODELS[name])
    return Pretrained(definition, *definition.init(jax.random.key(0)))


@pytest.mark.parametrize("experts_per_token", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_dense_model(name, experts_per_token):
    model = dense(name)
    sparse = Definition.of(upcycled_config(model.config, 4, experts_per_token))
    params, rest = upcycle(model.definition, model.params, sparse, jax.random.key(1))
    assert set(params) == set(sparse.param_names) and not rest
    assert all(params[name].shape == sparse.variables[name].shape for name in params)
    upcycled = Pretrained(sparse, params, rest)
    np.testing.assert_allclose(upcycled(TOKENS).logits, model(TOKENS).logits, rtol=2e-5, atol=2e-5)
    experts = np.asarray(params["moe_blocks.ffn.experts.down_EFD"])
    assert (experts == experts[:, :1]).all() and np.std(params["moe_blocks.ffn.router.gate_DE"]) > 0.05


def test_on_a_mesh_too():
    model, mesh = dense("llama"), make_mesh(MeshConfig(data=2, expert=4))
    sparse = Definition.of(upcycled_config(model.config, 4))
    with jax.set_mesh(mesh):
        params, rest = upcycle(model.definition, model.params, sparse, jax.random.key(1), mesh)
        logits = Pretrained(sparse, params, rest)(np.repeat(TOKENS, 2, axis=0)).logits
    assert params["moe_blocks.ffn.experts.down_EFD"].addressable_shards[0].data.shape[1] == 1
    np.testing.assert_allclose(logits, np.repeat(model(TOKENS).logits, 2, axis=0), rtol=2e-5, atol=2e-5)


def test_copies_part_and_then_the_router_learns():
    model = dense("llama")
    sparse = Definition.of(upcycled_config(model.config, 4))
    params, rest = upcycle(model.definition, model.params, sparse, jax.random.key(1))
    positions_BS = np.broadcast_to(np.arange(16, dtype=np.int32), TOKENS.shape)
    batch = {"tokens_BS": TOKENS, "segment_ids_BS": np.ones_like(TOKENS), "positions_BS": positions_BS}

    @jax.jit
    def gradient(params):
        totals = make_totals(sparse)(params, rest, batch, 1)
        return jax.grad(lambda params: make_loss(sparse)(params, rest, batch, totals).loss)(params)

    router, experts = "moe_blocks.ffn.router.gate_DE", "moe_blocks.ffn.experts.down_EFD"
    first = gradient(params)
    assert np.abs(first[router]).max() < 1e-6 < np.abs(first[experts][:, 0] - first[experts][:, 1]).max()
    second = gradient(jax.tree.map(lambda p, g: p - 0.5 * g, params, first))
    assert np.abs(second[router]).max() > 1e-5


def test_the_tool_makes_a_run_whose_export_is_the_same_model(tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    write_byte_tokenizer(tmp_path / "tokenizer")
    model = dataclasses.replace(dense("qwen3"), tokenizer=HFTokenizer(tmp_path / "tokenizer"))
    save_pretrained(model, tmp_path / "dense")
    run, out = str(tmp_path / "run"), tmp_path / "sparse"
    assert main(["convert", "--checkpoint", str(tmp_path / "dense"), "--run-dir", run, "--upcycle-experts", "4"]) == 0
    assert "4 experts" in capsys.readouterr().out
    assert main(["convert", "--run", run, "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3_moe"
    np.testing.assert_allclose(load_pretrained(out)(TOKENS).logits, model(TOKENS).logits, rtol=2e-5, atol=2e-5)
    capsys.readouterr()
    again = ["convert", "--checkpoint", str(out), "--run-dir", str(tmp_path / "b"), "--upcycle-experts", "4"]
    assert main(again) == 2
    assert "only a dense model can be upcycled" in capsys.readouterr().err
    assert main(["convert", "--run", run, "--out", str(tmp_path / "c"), "--upcycle-experts", "4"]) == 2
    assert "--upcycle-experts and --merge-experts: are for" in capsys.readouterr().err


@pytest.mark.parametrize("experts_per_token", [1, 5])
def test_illegal_numbers_are_named(experts_per_token):
    with pytest.raises(ConfigError, match=f"experts_per_token = {experts_per_token}.*at most num_experts = 4"):
        upcycled_config(LLAMA, 4, experts_per_token)
