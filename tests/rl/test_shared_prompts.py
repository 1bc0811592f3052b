"""Training a group's samples in one row behind their prompt gives what training each in a row of its own gives."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import (
    AttentionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PolicyLossConfig,
    RLConfig,
    SamplingConfig,
)
from moe_jax.data.problems import Problem
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.model.definition import Definition
from moe_jax.ops import attention as attention_op
from moe_jax.ops.attention import Branches
from moe_jax.rl.grpo import (
    completion_logprobs,
    completion_states,
    make_loss,
    minibatches,
    packed_rows,
    samples_in_row,
    shared_rows,
    split_rows,
    totals,
)
from moe_jax.rl.ppo import completion_values
from moe_jax.rl.train import PolicyTrainer
from moe_jax.sharding import make_mesh, put_batch

PAD, V = 0, 23
ONE, DENSE = MeshConfig(data=1), MoEConfig()
LATENT = AttentionConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
GROUPED = AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=8)
SPARSE = MoEConfig(num_experts=4, num_experts_per_token=2, num_shared_experts=1, expert_size=16)
HASHED = replace(SPARSE, routing="hash", selection_bias=False, bias_update_rate=0.0, sequence_balance_coef=0.0)


def config(attention, moe=DENSE):
    return ModelConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        intermediate_size=32,
        max_position=12,
        attention=attention,
        moe=moe,
        initializer_range=0.2,
    )


MODELS = {
    "dense": config(GROUPED),
    "latent": config(LATENT),
    "sparse": config(GROUPED, SPARSE),
    "sparse, latent": config(LATENT, SPARSE),
    "hash": config(GROUPED, HASHED),
}


def batch_of(P=4, G=4, S=5, N=6, seed=0):
    """Samples as `Rollout.batch` gives them: left-padded prompts, completions of unequal lengths."""
    rng = np.random.default_rng(seed)
    B = P * G
    prompt_PS = rng.integers(1, V, (P, S))
    mask_PS = np.arange(S) >= S - rng.integers(1, S + 1, P)[:, None]
    drawn_BN = np.arange(N) < rng.integers(1, N + 1, B)[:, None]
    drawn_BN[0] = True
    tokens_BN = np.where(drawn_BN, rng.integers(1, V, (B, N)), PAD)
    mask_BS = np.repeat(mask_PS, G, axis=0)
    counted_BN = drawn_BN & (np.arange(B) % 5 > 0)[:, None]
    return {
        "tokens_BS": np.concatenate([np.where(mask_BS, np.repeat(prompt_PS, G, axis=0), PAD), tokens_BN], axis=1),
        "segment_ids_BS": np.concatenate([mask_BS, drawn_BN], axis=1).astype(np.int32),
        "drawn_BN": drawn_BN,
        "mask_BN": counted_BN,
        "old_logprobs_BN": np.where(drawn_BN, rng.normal(-3, 0.3, (B, N)), 0).astype(np.float32),
        "ref_logprobs_BN": np.where(drawn_BN, rng.normal(-3, 0.3, (B, N)), 0).astype(np.float32),
        "advantages_B": rng.normal(size=B).astype(np.float32),
    }


def packed(rows):
    found = packed_rows(rows)
    assert found["branch_tokens_RKM"].shape[1] < rows["drawn_RCN"].shape[1]
    return found


RL = RLConfig(
    num_prompts=4,
    group_size=4,
    loss=PolicyLossConfig(beta=0.1),
    sampling=SamplingConfig(max_new_tokens=6),
    optimizer=OptimizerConfig(),
)


def loss_and_gradient(cfg, batch, mesh_cfg=ONE):
    definition = Definition.of(cfg)
    mesh = make_mesh(mesh_cfg)
    loss = make_loss(definition, RL, PAD)

    @jax.jit
    def run(params, rest, batch):
        def scalar(params):
            output = loss(params, rest, batch, totals(params, rest, batch, 1))
            return output.loss, (output.metrics, output.routers)

        found = jax.value_and_grad(scalar, has_aux=True)(params)
        logprobs = completion_logprobs(completion_states(definition, params, rest, batch), batch, PAD).logprobs
        return found, logprobs

    with jax.set_mesh(mesh):
        params, rest = definition.init(jax.random.key(0), mesh)
        return jax.device_get(run(params, rest, put_batch(batch, mesh)))


def assert_same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), one, other)


@pytest.mark.parametrize("name", MODELS)
def test_shared_prompts_change_rounding_only(name):
    """Log-probabilities, loss, gradients, metrics, router statistics; `max_position` is less than a row's columns."""
    batch = batch_of()
    alone, logprobs = loss_and_gradient(MODELS[name], shared_rows(batch, 1))
    for rows in (shared_rows(batch, 4), shared_rows(batch, 2), packed(shared_rows(batch, 4))):
        shared, shared_logprobs = loss_and_gradient(MODELS[name], rows)
        assert_same(alone, shared)
        drawn = batch["drawn_BN"]
        np.testing.assert_allclose(
            logprobs.reshape(drawn.shape)[drawn], shared_logprobs.reshape(drawn.shape)[drawn], atol=1e-5
        )


@pytest.mark.parametrize("mesh", [MeshConfig(data=4), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)])
@pytest.mark.parametrize(("name", "pack"), [("dense", False), ("sparse, latent", False), ("sparse, latent", True)])
def test_several_devices_give_what_one_does(name, pack, mesh):
    rows = shared_rows(batch_of(), 4)
    rows = packed(rows) if pack else rows
    assert_same(loss_and_gradient(MODELS[name], rows)[0], loss_and_gradient(MODELS[name], rows, mesh)[0])


def test_long_rows_go_block_by_block(monkeypatch):
    rows = shared_rows(batch_of(), 4)
    dense = loss_and_gradient(MODELS["latent"], rows)[0]
    monkeypatch.setattr(attention_op, "_MOST_SCORES", 8)
    monkeypatch.setattr(attention_op, "_BLOCK", 4)
    for same in (rows, packed(rows)):
        assert_same(dense, loss_and_gradient(MODELS["latent"], same)[0])


def test_completions_of_one_token():
    batch = batch_of(N=1)
    rows = shared_rows(batch, 4)
    alone = loss_and_gradient(MODELS["sparse"], shared_rows(batch, 1))[0]
    for same in (rows, packed(rows)):
        assert_same(alone, loss_and_gradient(MODELS["sparse"], same)[0])


def test_short_completions_share_branches():
    """Each token once, behind its predecessor in the same completion, in as few branches as first fit needs."""
    lengths_RC = np.array([[6, 3, 1, 2], [4, 4, 2, 2]])
    drawn_RCN = np.arange(6) < lengths_RC[..., None]
    tokens_RCN = np.where(drawn_RCN, np.arange(1, 49).reshape(2, 4, 6), PAD)
    found = packed({"drawn_RCN": drawn_RCN, "tokens_RCN": tokens_RCN})
    segments = [[[1] * 5, [2, 2, 4, 0, 0]], [[1, 1, 1, 3, 4], [2, 2, 2, 0, 0]]]
    np.testing.assert_array_equal(found["branch_segments_RKM"], segments)
    np.testing.assert_array_equal(found["branch_tokens_RKM"][0, 1], [7, 8, 19, PAD, PAD])
    np.testing.assert_array_equal(found["branch_targets_RKM"][0, 1], [8, 9, 20, PAD, PAD])
    firsts = [tokens_RCN[:, :, 0], found["branch_targets_RKM"].reshape(2, -1)]
    predicted = np.take_along_axis(np.concatenate(firsts, axis=1), found["place_RCN"].reshape(2, -1), axis=1)
    np.testing.assert_array_equal(predicted.reshape(drawn_RCN.shape)[drawn_RCN], tokens_RCN[drawn_RCN])
    whole = {"drawn_RCN": np.ones((1, 4, 6), bool), "tokens_RCN": tokens_RCN[:1]}
    assert packed_rows(whole) is whole  # nothing to gain


def test_a_critic_reads_packed_rows():
    definition = Definition.of(MODELS["dense"], value_head=True)
    params, rest = definition.init(jax.random.key(0))
    params["value_head_D"] = jax.random.normal(jax.random.key(1), params["value_head_D"].shape)
    rows = shared_rows(batch_of(), 4)
    plain, shared = (
        np.asarray(jax.jit(partial(completion_values, definition))(params, rest, batch))
        for batch in (rows, packed(rows))
    )
    drawn_BN = rows["drawn_RCN"].reshape(plain.shape)
    assert np.std(plain[drawn_BN]) > 0.1
    np.testing.assert_allclose(plain[drawn_BN], shared[drawn_BN], atol=1e-5)


def test_routers_count_tokens_that_another_follows():
    batch = batch_of()
    routers = loss_and_gradient(MODELS["sparse"], shared_rows(batch, 4))[0][0][1][1]
    followed = np.sum(batch["drawn_BN"].sum(axis=1) - 1)
    counted = np.sum(routers["moe_blocks"].counts_LE, axis=1)
    np.testing.assert_array_equal(counted, 2 * followed)  # experts a token


class Dice:
    """Completions of random worth."""

    def problems(self, step, count):
        return [Problem(prompt="7" * (1 + i % 3), answer="", key=str(i)) for i in range(count)]

    def score(self, completions):
        worth = [float(len(one.text) + sum(map(ord, one.text)) % 7) for one in completions]
        return [{"reward": w, "accuracy": w} for w in worth]

    def observe(self, step, accuracy):
        """Learns nothing."""


class Stops(ByteTokenizer):
    """Half of the tokens end a completion."""

    def __init__(self):
        super().__init__()
        self.stop_ids = tuple(range(10, 140))


def test_packing_changes_a_step_by_rounding_alone(monkeypatch):
    """Two minibatches of two micro-batches, with a reference."""
    definition = Definition.of(replace(MODELS["dense"], vocab_size=ByteTokenizer().vocab_size))
    mesh, found, branches = make_mesh(ONE), [], []
    for pack in (False, True):
        cfg = replace(RL, num_minibatches=2, accumulation_steps=2, pack_completions=pack, group_size=8)
        trainer = PolicyTrainer(definition, cfg, Stops(), prompt_length=5)

        def seen(rows, mesh, placed=trainer._placed):
            branches.append(placed(rows, mesh))
            return branches[-1]

        monkeypatch.setattr(trainer, "_placed", seen)
        with jax.set_mesh(mesh):
            state = trainer.start(*definition.init(jax.random.key(0), mesh), mesh)
            branches.clear()
            state, metrics, _ = trainer.step(Dice(), state, "rl", 0, 0, mesh)
        assert all(("place_RCN" in rows) == pack for rows in branches) and len(branches) == 3
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("time/", "tokens_per"))}
        found.append(jax.device_get((state.params, metrics)))
    assert found[0][1]["grad_norm"] > 0
    assert_same(*found)


def test_one_completion_does_not_see_another():
    definition = Definition.of(MODELS["latent"])
    model = definition.merge(*definition.init(jax.random.key(0)))
    stem_BP, branch_BCN = jnp.ones((1, 3), bool), jnp.ones((1, 2, 2), jnp.int32)
    tokens = jnp.arange(1, 8)[None]
    changed = tokens.at[0, 4].set(20)  # of the first branch, the last
    hidden, other = (model.read_branches(t, Branches(stem_BP, branch_BCN)).hidden_BSD[0] for t in (tokens, changed))
    moved = np.abs(np.asarray(hidden - other)).max(axis=1) > 1e-6
    np.testing.assert_array_equal(moved, [False] * 4 + [True] + [False] * 2)


def test_rows_hold_what_micro_batches_and_devices_divide():
    assert samples_in_row(RL) == 4
    assert samples_in_row(replace(RL, share_prompts=False)) == 1
    assert samples_in_row(replace(RL, num_minibatches=2, accumulation_steps=4)) == 2
    assert samples_in_row(RL, devices=4) == 4 and samples_in_row(RL, devices=8) == 2
    assert samples_in_row(RL, devices=16) == 1
    assert samples_in_row(RL, devices=3) == 4  # the rows do not divide whatever is done


def test_minibatches_are_the_same_whatever_the_devices():
    cfg = replace(RL, num_minibatches=2)
    rows = shared_rows(batch_of(), samples_in_row(cfg))
    parts = minibatches(rows, cfg, seed=0, step=0)
    assert len(parts) == 2 and parts[0]["prompts_RS"].shape == (2, 5) and parts[0]["mask_RCN"].shape == (2, 4, 6)
    for part in parts:
        split = split_rows(part, 2)
        np.testing.assert_array_equal(split["prompts_RS"], np.repeat(part["prompts_RS"], 2, axis=0))
        np.testing.assert_array_equal(split["tokens_RCN"].reshape(-1, 6), part["tokens_RCN"].reshape(-1, 6))
        np.testing.assert_array_equal(split["advantages_RC"].reshape(-1), part["advantages_RC"].reshape(-1))


def test_rows_that_a_mesh_would_divide_are_refused():
    definition = Definition.of(MODELS["dense"])
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=2))), pytest.raises(ValueError, match="axis context"):
        model = definition.merge(*definition.init(jax.random.key(0)))
        model.read_branches(
            jnp.ones((1, 8), jnp.int32), Branches(jnp.ones((1, 2), bool), jnp.ones((1, 3, 2), jnp.int32))
        )
