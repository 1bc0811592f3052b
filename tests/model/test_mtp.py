"""Multi-token prediction against the paper's equations on truncated sequences.

B batch, S sequence, D model, V vocabulary, N modules.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig
from moe_jax.losses.language_model import cross_entropy, next_token_targets
from moe_jax.model.definition import Definition
from moe_jax.model.layers import rotation
from moe_jax.model.transformer import Context
from moe_jax.ops.attention import Tokens

B, S, V, D = 2, 9, 19, 12
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=D,
    num_layers=2,
    intermediate_size=14,
    attention=AttentionConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, num_shared_experts=1, expert_size=7),
    mtp=MTPConfig(depth=2),
)
TOKENS_BS = np.random.default_rng(0).integers(0, V, (B, S)).astype(np.int32)
ONE_DOCUMENT = np.ones((B, S), np.int32), np.tile(np.arange(S, dtype=np.int32), (B, 1))
TWO_DOCUMENTS = np.array([[1] * 5 + [2] * 4] * B, np.int32), np.array([[*range(5), *range(4)]] * B, np.int32)


@jax.jit
def run(model, tokens_BS, segments_BS, positions_BS):
    """Trunk's output, modules' outputs, and each module's loss and that of the main head."""
    trunk = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=positions_BS).hidden_BSD
    ahead = model.predict_ahead(trunk, tokens_BS, segments_BS, positions_BS)
    losses = [
        cross_entropy(hidden, model.head(), *next_token_targets(tokens_BS, segments_BS, offset=offset))
        for offset, hidden in enumerate([trunk, *ahead.hidden_NBSD], start=1)
    ]
    return trunk, ahead, losses


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(CONFIG)


def test_follows_the_papers_recurrence(model):
    """h^k over positions 1..T-k only, as eq. 21-22 have it: no position without its token k ahead exists."""
    trunk, ahead, _ = run(model, TOKENS_BS, *ONE_DOCUMENT)
    mtp, a = model.mtp, CONFIG.attention

    @jax.jit
    def reference(mtp, trunk, embedded):
        hidden, outputs = trunk, []
        for k in (1, 2):
            block, embedding_norm, hidden_norm, output_norm = jax.tree.map(
                lambda x, k=k: x[k - 1], (mtp.blocks, mtp.embedding_norms, mtp.hidden_norms, mtp.output_norms)
            )
            length = S - k
            joined = [embedding_norm(embedded[:, k:]), hidden_norm(hidden[:, :length])]
            x = jnp.concatenate(joined, axis=-1) @ mtp.projection_N2DD[...][k - 1]
            ones = jnp.ones((B, length), jnp.int32)
            rot = rotation(jnp.cumsum(ones, axis=1) - 1, a.rope, a.qk_rope_head_dim)
            x, _, _ = block(x, Context(rot, Tokens(ones, jnp.arange(length)[None]), ones > 0, ones, False, 0, False))
            hidden = output_norm(x)
            outputs.append(hidden)
        return outputs

    expected = reference(mtp, trunk, np.asarray(model.embed_VD[...])[TOKENS_BS])
    for k, hidden in enumerate(expected, start=1):
        np.testing.assert_allclose(np.asarray(ahead.hidden_NBSD)[k - 1, :, : S - k], hidden, atol=2e-5, rtol=1e-4)


def test_losses_are_cross_entropies_further_ahead(model):
    trunk, ahead, losses = run(model, TOKENS_BS, *ONE_DOCUMENT)
    head = np.asarray(model.head(), np.float64)
    for offset, (hidden, loss) in enumerate(zip([trunk, *ahead.hidden_NBSD], losses, strict=True), start=1):
        logits = np.asarray(hidden, np.float64) @ head
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        nll = [-logprobs[b, i, TOKENS_BS[b, i + offset]] for b in range(B) for i in range(S - offset)]
        assert loss.count == len(nll)
        np.testing.assert_allclose(loss.mean(), np.mean(nll), rtol=1e-4)
        assert loss.mean() > 0.1


def test_hidden_first_swaps_the_projections_halves(model, random_model):
    """[hidden; embedding] · [A; B] = [embedding; hidden] · [B; A]."""
    other = random_model(dataclasses.replace(CONFIG, mtp=dataclasses.replace(CONFIG.mtp, hidden_first=True)))
    first, second = np.split(np.asarray(model.mtp.projection_N2DD[...]), 2, axis=1)
    same_weights = run(other, TOKENS_BS, *ONE_DOCUMENT)[1].hidden_NBSD
    other.mtp.projection_N2DD[...] = jnp.asarray(np.concatenate([second, first], axis=1))
    swapped = run(other, TOKENS_BS, *ONE_DOCUMENT)[1].hidden_NBSD
    expected = run(model, TOKENS_BS, *ONE_DOCUMENT)[1].hidden_NBSD
    np.testing.assert_allclose(swapped, expected, atol=2e-5, rtol=1e-4)
    assert np.abs(np.asarray(same_weights) - expected).max() > 0.1


def test_documents_do_not_see_each_other(model):
    """Other tokens in the second document change no valid position of the first, and nothing that is counted of it."""
    changed = np.where(TWO_DOCUMENTS[0] == 2, (TOKENS_BS + 5) % V, TOKENS_BS)
    before, after = (np.asarray(run(model, t, *TWO_DOCUMENTS)[1].hidden_NBSD) for t in (TOKENS_BS, changed))
    for k in (1, 2):
        np.testing.assert_array_equal(after[k - 1, :, : 5 - k], before[k - 1, :, : 5 - k])
        assert np.any(after[k - 1, :, 5 - k : 5] != before[k - 1, :, 5 - k : 5])  # the positions that must not count
    only_first = np.where(TWO_DOCUMENTS[0] == 1, 1, 0).astype(np.int32)
    _, ahead, losses = run(model, TOKENS_BS, only_first, TWO_DOCUMENTS[1])
    _, ahead_changed, losses_changed = run(model, changed, only_first, TWO_DOCUMENTS[1])
    jax.tree.map(np.testing.assert_array_equal, losses_changed, losses)
    jax.tree.map(np.testing.assert_array_equal, ahead_changed.router, ahead.router)


def test_routers_count_positions_whose_token_ahead_exists(model):
    stats = run(model, TOKENS_BS, *TWO_DOCUMENTS)[1].router
    np.testing.assert_array_equal(stats.tokens_B, [[7, 7], [5, 5]])
    np.testing.assert_array_equal(np.sum(stats.counts_BE, axis=-1), [[14, 14], [10, 10]])


@pytest.mark.parametrize(("kind", "own"), [("causal", "mtp.projection_N2DD"), ("parallel", "mtp.output_norms.weight")])
def test_gradient_reaches_the_modules_the_shared_parts_and_the_trunk(kind, own, random_model):
    # Dense layers, which compile quickly.
    cfg = dataclasses.replace(CONFIG, moe=MoEConfig(), mtp=MTPConfig(depth=2, kind=kind))
    graph, params, rest = nnx.split(random_model(cfg), nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params):
        losses = run(nnx.merge(graph, params, rest), TOKENS_BS, *ONE_DOCUMENT)[2]
        return losses[1].mean() + losses[2].mean()

    found = {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(gradient(params))}
    assert {"embed_VD", "head_DV", own, "dense_blocks.ffn.gate_up_D2F", "norm.weight"} <= found.keys()
    for name, g in found.items():
        assert np.all(np.isfinite(g)) and np.abs(g).max() > 1e-6, name
    for module in found[own]:
        assert np.abs(module).max() > 1e-4


# Parallel heads ------------------------------------------------------------------------------------------------------

PARALLEL = dataclasses.replace(CONFIG, mtp=MTPConfig(depth=2, kind="parallel"))


def test_parallel_heads_are_blocks_on_the_trunks_output(random_model):
    model = random_model(PARALLEL)
    trunk, ahead, losses = run(model, TOKENS_BS, *TWO_DOCUMENTS)
    mtp, a, (segments_BS, positions_BS) = model.mtp, CONFIG.attention, TWO_DOCUMENTS
    rot = rotation(positions_BS, a.rope, a.qk_rope_head_dim)
    ctx = Context(
        rot, Tokens(segments_BS, jnp.arange(segments_BS.shape[1])[None]), segments_BS > 0, positions_BS, False, 0, False
    )
    for k in (0, 1):
        block, output_norm = jax.tree.map(lambda x, k=k: x[k], (mtp.blocks, mtp.output_norms))
        expected = output_norm(jax.jit(lambda block, x: block(x, ctx)[0])(block, trunk))
        np.testing.assert_allclose(ahead.hidden_NBSD[k], expected, atol=2e-5, rtol=1e-4)
    assert [loss.count for loss in losses] == [2 * 7, 2 * 5, 2 * 3] and all(loss.mean() > 0.1 for loss in losses)
    np.testing.assert_array_equal(ahead.router.tokens_B, [[S, S], [S, S]])


def test_parallel_heads_read_nothing_ahead_and_causal_modules_up_to_their_target(model, random_model):
    changed = TOKENS_BS.copy()
    changed[:, 5:] = (changed[:, 5:] + 5) % V
    for one, ahead in ((random_model(PARALLEL), (0, 0)), (model, (1, 2))):
        before, after = (np.asarray(run(one, t, *ONE_DOCUMENT)[1].hidden_NBSD) for t in (TOKENS_BS, changed))
        for k, reach in enumerate(ahead):
            np.testing.assert_array_equal(after[k, :, : 5 - reach], before[k, :, : 5 - reach])
            assert np.all(np.any(after[k, :, 5 - reach :] != before[k, :, 5 - reach :], axis=-1))


def test_parallel_heads_have_no_embedding_head_or_projection():
    names = {name for name in Definition.of(PARALLEL).variables if name.startswith("mtp")}
    assert {name for name in names if not name.startswith("mtp.blocks")} == {"mtp.output_norms.weight"}
    causal = {name for name in Definition.of(CONFIG).variables if name.startswith("mtp.blocks")}
    assert names == causal | {"mtp.output_norms.weight"}


def test_depth_0_builds_nothing(random_model):
    cfg = dataclasses.replace(CONFIG, mtp=MTPConfig(depth=0))
    assert not any(name.startswith("mtp") for name in Definition.of(cfg).variables)
    assert random_model(cfg).mtp is None


def test_modules_share_embedding_and_head():
    names = [name for name in Definition.of(CONFIG).variables if name.startswith("mtp")]
    assert names and not any("embed_VD" in name or "head_DV" in name for name in names)
