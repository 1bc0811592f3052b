"""The sampler against the uncached model, and its distributions against numpy.

P prompts, G samples per prompt, B rows (P·G), N new tokens, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, MeshConfig, ModelConfig, MoEConfig, RoPEConfig, SamplingConfig
from moe_jax.model.definition import Definition
from moe_jax.ops.token_logprobs import token_logprobs
from moe_jax.sampling import sampler
from moe_jax.sampling.distribution import sample_token, token_at, truncate
from moe_jax.sampling.sampler import Samples, pad_prompts
from moe_jax.sharding import make_mesh

V, PAD, STOP, G, N = 13, 0, 1, 3, 8
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=12,
    num_layers=2,
    intermediate_size=14,
    attention=AttentionConfig(
        num_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        rope=RoPEConfig(theta=50.0, layout="interleaved"),
    ),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, num_shared_experts=1, expert_size=7),
    max_position=32,
)
PROMPTS = [[5, 3, 9, 2], [7], [4, 4]]
SAMPLING = SamplingConfig(max_new_tokens=N)
generate = jax.jit(sampler.generate, static_argnames=("cfg", "stop_ids", "pad_id", "group_size"))


@functools.cache
def model(pad_scale=1.0, stop_scale=1.0):
    """Random weights; the head's columns of PAD and STOP can be made to dominate."""
    definition, rng = Definition.of(CONFIG), np.random.default_rng(0)
    arrays = {
        name: ("norm" in name) + 0.3 * rng.normal(size=v.shape).astype(np.float32)
        for name, v in definition.variables.items()
    }
    arrays["head_DV"][:, PAD] *= pad_scale
    arrays["head_DV"][:, STOP] *= stop_scale
    arrays = jax.tree.map(jnp.asarray, arrays)
    params = {name: arrays.pop(name) for name in definition.param_names}
    return definition.merge(params, arrays)


def draw(cfg=SAMPLING, *, seed=0, side="left", **scales) -> Samples:
    tokens, mask = pad_prompts(PROMPTS, PAD)
    if side == "right":
        for row, valid, prompt in zip(tokens, mask, PROMPTS, strict=True):
            row[:], valid[:] = PAD, False
            row[: len(prompt)], valid[: len(prompt)] = prompt, True
    samples = generate(
        model(**scales), tokens, mask, jax.random.key(seed), cfg, stop_ids=(STOP,), pad_id=PAD, group_size=G
    )
    return jax.tree.map(np.asarray, samples)


@jax.jit
def trainer_logprobs(model, tokens_BS):
    """log p(token i + 1 | tokens up to i) as a loss computes it, and the logits."""
    hidden = model(tokens_BS).hidden_BSD
    targets = jnp.roll(tokens_BS, -1, axis=1)
    return token_logprobs(hidden, model.head(), targets, banned_ids=(PAD,)).logprobs, model.logits(hidden)


def rescore(samples, **scales):
    """The trainer's view of each row: (log-probabilities [N], logits [N, V]) of its completion, without padding."""
    tokens = np.full((len(PROMPTS) * G, 4 + N + 1), 2, np.int32)
    for b, row in enumerate(tokens):
        prompt = PROMPTS[b // G]
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + N] = samples.tokens_BN[b]
    logprobs, logits = trainer_logprobs(model(**scales), tokens)
    starts = [len(PROMPTS[b // G]) - 1 for b in range(len(tokens))]
    return (
        np.stack([np.asarray(logprobs)[b, s : s + N] for b, s in enumerate(starts)]),
        np.stack([np.asarray(logits)[b, s : s + N] for b, s in enumerate(starts)]),
    )


def test_logprobs_are_the_trainers():
    samples = draw()
    logprobs, _ = rescore(samples)
    assert samples.mask_BN.sum() > 30
    np.testing.assert_allclose(samples.logprobs_BN[samples.mask_BN], logprobs[samples.mask_BN], atol=1e-4)
    assert np.all(samples.logprobs_BN[samples.mask_BN] < 0)


def test_rows_end_with_the_stop_token_and_nothing_follows():
    samples = draw()
    assert 0 < samples.finished_B.sum() < len(samples.finished_B)
    for tokens, mask, logprobs, finished in zip(
        samples.tokens_BN, samples.mask_BN, samples.logprobs_BN, samples.finished_B, strict=True
    ):
        length = mask.sum()
        assert np.all(mask[:length]) and not np.any(mask[length:])
        assert finished == (STOP in tokens)
        if finished:
            assert tokens[length - 1] == STOP and STOP not in tokens[: length - 1]
        else:
            assert length == N
        assert np.all(tokens[length:] == PAD) and not np.any(logprobs[length:])


def test_samples_of_a_group_differ_and_seeds_repeat():
    first, again, other = draw(), draw(), draw(seed=1)
    np.testing.assert_array_equal(first.tokens_BN, again.tokens_BN)
    assert np.any(first.tokens_BN != other.tokens_BN)
    groups = first.tokens_BN.reshape(-1, G, N)
    assert any(np.any(group[0] != group[1]) for group in groups)


def test_padding_of_prompts_on_either_side_gives_the_same():
    left, right = draw(), draw(side="right")
    np.testing.assert_array_equal(left.tokens_BN, right.tokens_BN)
    np.testing.assert_allclose(left.logprobs_BN, right.logprobs_BN, atol=1e-5)


def test_pad_is_never_drawn_even_when_it_dominates():
    samples = draw(pad_scale=50.0)
    logprobs, logits = rescore(samples, pad_scale=50.0)
    drawn = samples.mask_BN
    assert np.any(np.argmax(logits, axis=-1)[drawn] == PAD)
    assert not np.any(samples.tokens_BN[drawn] == PAD)
    np.testing.assert_allclose(samples.logprobs_BN[drawn], logprobs[drawn], atol=1e-4)


def test_temperature_0_is_the_argmax_of_the_uncached_model():
    samples = draw(dataclasses.replace(SAMPLING, temperature=0.0))
    _, logits = rescore(samples)
    best = np.argmax(np.where(np.arange(V) == PAD, -np.inf, logits), axis=-1)
    np.testing.assert_array_equal(samples.tokens_BN[samples.mask_BN], best[samples.mask_BN])
    rows = samples.tokens_BN.reshape(-1, G, N)
    np.testing.assert_array_equal(rows, np.repeat(rows[:, :1], G, axis=1))


@pytest.fixture
def steps(monkeypatch):
    """Counts how many tokens are drawn per call."""
    count = []

    def counted(*args):
        jax.debug.callback(lambda: count.append(1))
        return token_at(*args)

    monkeypatch.setattr(sampler, "token_at", counted)
    return count


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "option",
    [
        {"compactions": 2},
        {"compactions": 9},
        *({"slots": slots} for slots in (1, 2, 8, 9, 99)),
        {"slots": 4, "compactions": 1},
        *({"cache_parts": parts} for parts in (2, 3, N)),
    ],
    ids=str,
)
def test_samples_do_not_depend_on_how_rows_and_caches_are_managed(option, side):
    """Nine rows, some of which stop early."""
    plain = draw(side=side)
    assert len(set(np.sum(plain.mask_BN, axis=1).tolist())) > 2
    other = draw(dataclasses.replace(SAMPLING, **option), side=side)
    for name in ("tokens_BN", "mask_BN", "finished_B"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(other, name))
    np.testing.assert_allclose(plain.logprobs_BN, other.logprobs_BN, atol=1e-5)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_several_devices_let_rows_wait_as_one_does(kind):
    attention = CONFIG.attention
    if kind == "gqa":
        attention = AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=6)
    definition = Definition.of(dataclasses.replace(CONFIG, attention=attention, initializer_range=0.3))
    tokens, mask = pad_prompts([[5, 3, 9, 2], [7], [4, 4], [3]], PAD)
    found = []
    for cfg, devices in ((SAMPLING, 1), (dataclasses.replace(SAMPLING, slots=8, compactions=1), 4)):
        mesh = make_mesh(MeshConfig(data=devices))
        with jax.set_mesh(mesh):
            params, rest = definition.init(jax.random.key(0), mesh)

            @jax.jit
            def run(params, rest, cfg=cfg):
                model = definition.merge(params, rest)
                options = {"stop_ids": (STOP, 2, 3), "pad_id": PAD, "group_size": 4}
                return sampler.generate(model, tokens, mask, jax.random.key(0), cfg, **options)

            found.append(jax.device_get(run(params, rest)))
    assert found[0].finished_B.sum() > 0
    np.testing.assert_array_equal(found[0].tokens_BN, found[1].tokens_BN)


def test_the_cache_grows_as_it_is_needed():
    """Of the new tokens' columns the first loop has half, the second all."""
    tokens, mask = pad_prompts(PROMPTS, PAD)
    widths = []
    for parts in (1, 2):
        cfg = dataclasses.replace(SAMPLING, cache_parts=parts)
        options = {"cfg": cfg, "stop_ids": (STOP,), "pad_id": PAD, "group_size": G}
        run = functools.partial(sampler.generate, **options)
        jaxpr = jax.make_jaxpr(run)(model(), tokens, mask, jax.random.key(0)).jaxpr
        carried = [[v.aval.shape for v in e.outvars] for e in jaxpr.eqns if e.primitive.name == "while"]
        rows = len(PROMPTS) * G
        loops = [{shape[1] for shape in shapes if len(shape) == 3 and shape[0] == rows} for shapes in carried]
        widths.append([lengths for lengths in loops if lengths])
    S = tokens.shape[1]
    assert widths == [[{S + N}], [{S + N // 2}, {S + N}]]


@pytest.mark.parametrize("option", [{"slots": 3}, {"slots": 5}, {"compactions": 3}])
def test_finished_rows_are_not_decoded(monkeypatch, option):
    """The rows of all passes together: fewer than with all rows until the last has stopped."""
    rows = []

    def counted(uniform_B1, *rest):
        jax.debug.callback(lambda: rows.append(len(uniform_B1)))
        return token_at(uniform_B1, *rest)

    monkeypatch.setattr(sampler, "token_at", counted)
    tokens, mask = pad_prompts(PROMPTS, PAD)
    totals = []
    for cfg in (SAMPLING, dataclasses.replace(SAMPLING, **option)):
        rows.clear()
        options = {"cfg": cfg, "stop_ids": (STOP, 2), "pad_id": PAD, "group_size": G}
        samples = jax.jit(functools.partial(sampler.generate, **options))(model(), tokens, mask, jax.random.key(0))
        jax.effects_barrier()
        totals.append(sum(rows))
    assert np.sum(samples.mask_BN) <= totals[1] < totals[0]


def test_decoding_stops_when_all_rows_have_stopped(steps):
    tokens, mask = pad_prompts(PROMPTS, PAD)
    everything = tuple(range(1, V))
    counted = jax.jit(functools.partial(sampler.generate, cfg=SAMPLING, stop_ids=everything, pad_id=PAD))
    samples = counted(model(), tokens, mask, jax.random.key(0))
    jax.effects_barrier()
    assert len(steps) == 1
    assert np.all(samples.finished_B) and np.all(np.sum(samples.mask_BN, axis=1) == 1)


def test_context_and_prompts_that_do_not_fit_are_refused():
    tokens, mask = pad_prompts(PROMPTS, PAD, length=25)
    with pytest.raises(ValueError, match=r"25 tokens and 8 new ones exceed the model's context of 32"):
        generate(model(), tokens, mask, jax.random.key(0), SAMPLING, stop_ids=(STOP,), pad_id=PAD)
    with pytest.raises(ValueError, match="a prompt has 4 tokens and the room for prompts is 3"):
        pad_prompts(PROMPTS, PAD, length=3)
    with pytest.raises(ValueError, match="empty prompt"):
        pad_prompts([[1], []], PAD)


def test_pad_prompts():
    tokens, mask = pad_prompts([[5, 6], [7]], PAD, length=3)
    np.testing.assert_array_equal(tokens, [[0, 5, 6], [0, 0, 7]])
    np.testing.assert_array_equal(mask, [[False, True, True], [False, False, True]])


# Distributions -------------------------------------------------------------------------------------------------------


def kept(logits_V, **options):
    cfg = SamplingConfig(**options)
    truncated = jax.jit(truncate, static_argnames="cfg")(np.asarray(logits_V, np.float32)[None], cfg=cfg)
    return set(np.flatnonzero(np.isfinite(truncated[0])).tolist())


LOGITS_V = np.log([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        ({"top_p": 1e-6}, {1}),
        ({"min_p": 0.26}, {1, 3, 4}),
        ({"min_p": 0.24}, {1, 2, 3, 4}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.8}, {1, 3}),  # of the three's 0.85, two hold 0.82
        ({"top_k": 4, "min_p": 0.5}, {1, 3}),
    ],
)
def test_truncation_keeps_the_right_tokens(options, expected):
    assert kept(LOGITS_V, **options) == expected


def test_frequencies_match_probabilities():
    rng = np.random.default_rng(0)
    logits, rows = rng.normal(size=8).astype(np.float32), 20_000
    logits[3] = -np.inf
    cfg = SamplingConfig(temperature=0.7, top_k=6)
    token, logprob = jax.jit(sample_token, static_argnames="cfg")(
        jax.random.key(4), np.tile(logits, (rows, 1)), cfg=cfg
    )
    probability = np.exp(np.where(np.argsort(np.argsort(-logits)) < 6, logits / 0.7, -np.inf))
    probability /= probability.sum()
    counts = np.bincount(token, minlength=8)
    assert not counts[probability == 0].any()
    live = probability > 0
    chi_square = np.sum((counts - rows * probability)[live] ** 2 / (rows * probability)[live])
    assert chi_square < 20.5  # the 99.9 % point at 5 degrees of freedom
    np.testing.assert_allclose(logprob, np.log(probability[np.asarray(token)]), atol=1e-5)


def test_rows_do_not_depend_on_the_other_rows():
    logits = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    key, cfg = jax.random.key(0), SamplingConfig()
    many, few = sample_token(key, logits, cfg)[0], sample_token(key, logits[:2], cfg)[0]
    np.testing.assert_array_equal(np.asarray(many)[:2], few)


def test_impossible_tokens_are_not_drawn_wherever_the_random_number_falls(monkeypatch):
    """Rounding in a large vocabulary's cumulative sum must not give a token of probability 0 a slot of its own."""
    rng, size = np.random.default_rng(0), 5000
    probability = rng.dirichlet(np.ones(size), size=8).astype(np.float32)
    probability[rng.random(probability.shape) < 0.3] = 0
    with np.errstate(divide="ignore"):
        logits = np.log(probability)
    p = jnp.exp(jax.nn.log_softmax(logits, axis=-1))
    cumulative = np.asarray(jnp.cumsum(p, axis=-1))
    slots = (np.diff(cumulative, axis=1) > 0) & (np.asarray(p)[:, 1:] == 0)
    assert slots.sum() > 20
    edges = np.stack([np.where(s)[0][:3] for s in slots])
    for edge in edges.T:
        for ulps in range(-2, 3):
            u = np.take_along_axis(cumulative, edge[:, None], axis=1) / cumulative[:, -1:]
            u = np.float32(u + ulps * np.spacing(u))
            monkeypatch.setattr(jax.random, "uniform", lambda key, shape, u=u: jnp.asarray(u))
            token, logprob = sample_token(jax.random.key(0), jnp.asarray(logits), SamplingConfig())
            assert np.all(np.isfinite(logprob))
            assert np.all(np.take_along_axis(probability, np.asarray(token)[:, None], axis=1) > 0)


@pytest.mark.parametrize("u", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_extreme_random_numbers_draw_possible_tokens(monkeypatch, u):
    logits = jnp.asarray([[-np.inf, 0.0, -1.0, -np.inf]])
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, u, jnp.float32))
    token, _ = sample_token(jax.random.key(0), logits, SamplingConfig())
    assert token.item() == (1 if u == 0 else 2)
