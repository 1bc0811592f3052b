"""Dense students made of a sparse teacher's experts: exact where one expert does all the work, and what is kept."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.__main__ import main
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from moe_jax.data.tokenizer import HFTokenizer
from moe_jax.interop.byte_tokenizer import write_byte_tokenizer
from moe_jax.interop.pretrained import Pretrained, save_pretrained
from moe_jax.model.definition import Definition
from moe_jax.training.expert_merging import expert_load, merge_experts, merged_config

SPARSE = ModelConfig(
    vocab_size=265,
    hidden_size=32,
    num_layers=3,
    intermediate_size=40,
    first_k_dense=1,
    initializer_range=0.1,
    attention=AttentionConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(
        num_experts=4, num_experts_per_token=1, num_shared_experts=1, expert_size=16, routed_scaling_factor=2.0
    ),
)
TOKENS = np.random.default_rng(0).integers(9, 265, (2, 16)).astype(np.int32)


def teacher(cfg, favourite=None):
    """With a favourite, all tokens go to that expert."""
    definition = Definition.of(cfg)
    params, rest = definition.init(jax.random.key(0))
    if favourite is not None:
        rest = {name: bias.at[:, favourite].set(100.0) for name, bias in rest.items()}
    return Pretrained(definition, params, rest)


def batch():
    positions_BS = np.broadcast_to(np.arange(16, dtype=np.int32), TOKENS.shape)
    return {"tokens_BS": TOKENS, "segment_ids_BS": np.ones_like(TOKENS), "positions_BS": positions_BS}


@pytest.mark.parametrize("kept", [1, 2])  # as wide as the dense layer (filled up with zeros), and wider
def test_where_one_expert_does_all_the_work_the_logits_are_the_same(kept):
    model = teacher(SPARSE, favourite=2)
    load_LE = expert_load(model.definition, model.params, model.rest, [batch()])
    np.testing.assert_array_equal(load_LE, [[0, 0, 32, 0]] * 2)
    dense = Definition.of(merged_config(SPARSE, kept))
    assert dense.cfg.intermediate_size == {1: 40, 2: 48}[kept] and not dense.cfg.num_moe_layers
    params = merge_experts(model.definition, model.params, load_LE, kept, dense)
    assert all(params[name].shape == dense.variables[name].shape for name in dense.param_names)
    np.testing.assert_allclose(Pretrained(dense, params, {})(TOKENS).logits, model(TOKENS).logits, rtol=2e-5, atol=2e-5)


def test_the_most_loaded_are_kept_by_their_shares():
    cfg = dataclasses.replace(SPARSE, first_k_dense=0)
    model, dense = teacher(cfg), Definition.of(merged_config(cfg, 2))
    load_LE = np.array([[1, 30, 10, 2], [5, 0, 0, 15], [4, 4, 1, 1]], np.float32)
    params = merge_experts(model.definition, model.params, load_LE, 2, dense)
    experts = np.asarray(model.params["moe_blocks.ffn.experts.down_EFD"])
    down = np.asarray(params["dense_blocks.ffn.down_FD"])
    np.testing.assert_allclose(down[0, :16], experts[0, 1] * 2 * 0.75, rtol=1e-6)
    np.testing.assert_allclose(down[0, 16:32], experts[0, 2] * 2 * 0.25, rtol=1e-6)
    np.testing.assert_allclose(down[1, :16], experts[1, 3] * 2 * 0.75, rtol=1e-6)
    np.testing.assert_array_equal(down[:, 32:], model.params["moe_blocks.ffn.shared.down_FD"])
    gate_up = np.asarray(params["dense_blocks.ffn.gate_up_D2F"])
    np.testing.assert_array_equal(gate_up[1][..., :16], model.params["moe_blocks.ffn.experts.gate_up_ED2F"][1, 3])


def test_the_tool_makes_a_run_of_it(tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    write_byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} and {n} make {2 * n}. " * 400 for n in range(3)))
    model = dataclasses.replace(teacher(SPARSE, favourite=1), tokenizer=HFTokenizer(tmp_path / "tokenizer"))
    save_pretrained(model, tmp_path / "sparse")
    arguments = ["convert", "--checkpoint", str(tmp_path / "sparse"), "--data.path", str(tmp_path / "text.txt")]
    run = ["--run-dir", str(tmp_path / "run")]
    assert main([*arguments, *run, "--merge-experts", "2"]) == 0
    assert "2 experts merged" in capsys.readouterr().out
    assert main(["generate", *["--run", run[1]], "--prompt", "1", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--run-dir", str(tmp_path / "b"), "--merge-experts", "2", "--upcycle-experts", "2"]) == 2
    assert "one of --upcycle-experts and --merge-experts" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 5])
def test_illegal_numbers_are_named(kept):
    with pytest.raises(ConfigError, match=f"merge_experts = {kept}.*at most the 4"):
        merged_config(SPARSE, kept)
