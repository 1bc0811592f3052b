"""Speculative decoding draws what plain decoding draws, whatever is drafted.

P prompts, G samples per prompt, B rows (P·G), J drafts, S places of a pass (J + 1), N new tokens, V vocabulary.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, MTPConfig, SamplingConfig
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.model.definition import Definition
from moe_jax.ops.token_logprobs import token_logprobs
from moe_jax.rl.grpo import make_generator
from moe_jax.sampling import sampler
from moe_jax.sampling.distribution import log_probabilities
from moe_jax.sampling.sampler import acceptance, begin_speculation, model_for_decoding, pad_prompts, speculation_metrics
from moe_jax.sampling.speculative import Drafts, SpeculativeDecoder, single_modules, verify
from moe_jax.sampling.stream import Stream

V, PAD, STOP, G, N = 13, 0, 1, 3, 10
MLA = ModelConfig(
    vocab_size=V,
    hidden_size=12,
    num_layers=2,
    intermediate_size=14,
    attention=AttentionConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, num_shared_experts=1, expert_size=7),
    mtp=MTPConfig(depth=1),
    max_position=64,
)
GQA = dataclasses.replace(
    MLA,
    attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=6),
    moe=MoEConfig(),
    mtp=MTPConfig(depth=2, hidden_first=True),
)
PROMPTS = [[5, 3, 9, 2], [7], [4, 4]]
generate = jax.jit(sampler.generate, static_argnames=("cfg", "stop_ids", "pad_id", "group_size"))


@functools.cache
def arrays_of(cfg: ModelConfig, agreement: float = 1.0, size: float = 0.3):
    """A random model in which, the greater the agreement, the more the next token follows from the last alone.

    The modules pass the last token on to the head as the trunk does, so that they draft well.
    """
    definition, rng = Definition.of(cfg), np.random.default_rng(0)
    arrays = {
        name: ("norm" in name) + size * rng.normal(size=v.shape).astype(np.float32)
        for name, v in definition.variables.items()
    }
    D = cfg.hidden_size
    arrays["embed_VD"] *= 1 + 3 * agreement
    embedding = slice(D, None) if cfg.mtp.hidden_first else slice(0, D)
    arrays["mtp.projection_N2DD"][:, embedding] += 4 * agreement * np.eye(D)
    arrays = jax.tree.map(jnp.asarray, arrays)
    params = {name: arrays.pop(name) for name in definition.param_names}
    return definition, params, arrays


def model_of(cfg: ModelConfig, **options):
    definition, params, rest = arrays_of(cfg, **options)
    return definition.merge(params, rest)


def draw(cfg: ModelConfig, seed=0, side="left", prompts=PROMPTS, group_size=G, stop_ids=(STOP,), **sampling):
    tokens, mask = pad_prompts(prompts, PAD)
    if side == "right":
        for row, valid, prompt in zip(tokens, mask, prompts, strict=True):
            row[:], valid[:] = PAD, False
            row[: len(prompt)], valid[: len(prompt)] = prompt, True
    samples = generate(
        model_of(cfg),
        tokens,
        mask,
        jax.random.key(seed),
        SamplingConfig(**{"max_new_tokens": N, **sampling}),
        stop_ids=stop_ids,
        pad_id=PAD,
        group_size=group_size,
    )
    return jax.tree.map(np.asarray, samples)


@pytest.mark.parametrize(("cfg", "drafts"), [(MLA, 3), (GQA, 1), (GQA, 3)])
def test_greedy_tokens_are_those_of_plain_decoding(cfg, drafts):
    plain = draw(cfg, temperature=0)
    fast = draw(cfg, temperature=0, speculative_tokens=drafts)
    np.testing.assert_array_equal(fast.tokens_BN, plain.tokens_BN)
    np.testing.assert_array_equal(fast.mask_BN, plain.mask_BN)
    np.testing.assert_array_equal(fast.finished_B, plain.finished_B)
    passes_B, accepted_BJ = fast.speculation
    assert np.any(accepted_BJ) and np.any(accepted_BJ < passes_B[:, None])
    assert len(set(passes_B.tolist())) > 1  # rows kept different numbers
    assert np.all(np.diff(accepted_BJ, axis=1) <= 0)


@pytest.fixture(scope="module")
def sampled():
    return draw(MLA, speculative_tokens=3)


def test_logprobs_are_the_trainers(sampled):
    model, tokens = model_of(MLA), np.full((len(PROMPTS) * G, 4 + N + 1), 2, np.int32)
    for b, row in enumerate(tokens):
        prompt = PROMPTS[b // G]
        row[: len(prompt)], row[len(prompt) : len(prompt) + N] = prompt, sampled.tokens_BN[b]

    @jax.jit
    def trainer(tokens_BS):
        hidden = model(tokens_BS).hidden_BSD
        return token_logprobs(hidden, model.head(), jnp.roll(tokens_BS, -1, axis=1), banned_ids=(PAD,)).logprobs

    logprobs = np.asarray(trainer(tokens))
    starts = [len(PROMPTS[b // G]) - 1 for b in range(len(tokens))]
    logprobs = np.stack([logprobs[b, s : s + N] for b, s in enumerate(starts)])
    drawn = sampled.mask_BN
    assert drawn.sum() > 30
    np.testing.assert_allclose(sampled.logprobs_BN[drawn], logprobs[drawn], atol=1e-4)
    assert not np.any(sampled.logprobs_BN[~drawn])


def test_rows_end_with_the_stop_token_and_nothing_follows(sampled):
    assert 0 < sampled.finished_B.sum() < len(sampled.finished_B)
    for tokens, mask, finished in zip(sampled.tokens_BN, sampled.mask_BN, sampled.finished_B, strict=True):
        length = mask.sum()
        assert np.all(mask[:length]) and np.all(tokens[length:] == PAD) and PAD not in tokens[:length]
        assert finished == (STOP in tokens) and STOP not in tokens[: length - 1]
        assert finished or length == N


def test_draws_depend_on_key_and_row_alone(sampled):
    np.testing.assert_array_equal(draw(MLA, speculative_tokens=3, side="right").tokens_BN, sampled.tokens_BN)
    few = draw(MLA, speculative_tokens=3, prompts=[PROMPTS[0], [6]])
    np.testing.assert_array_equal(few.tokens_BN[:G], sampled.tokens_BN[:G])
    assert np.any(draw(MLA, seed=1, speculative_tokens=3).tokens_BN != sampled.tokens_BN)


@pytest.mark.parametrize(
    ("cfg", "options"),
    [(MLA, {"temperature": 0.7, "top_k": 5, "speculative_tokens": 2}), (GQA, {"top_p": 0.8, "speculative_tokens": 3})],
)
def test_completions_have_the_models_distribution(cfg, options):
    """Every completion of 3 tokens as often as the model's probabilities say, by a chi-square test."""
    sampling, rows = SamplingConfig(max_new_tokens=3, **options), 6000
    samples = draw(cfg, prompts=[[5, 3]], group_size=rows, stop_ids=(), max_new_tokens=3, **options)
    accepted_J = samples.speculation.accepted_BJ.sum(axis=0)
    assert 0.1 * rows < accepted_J[0] < 0.95 * samples.speculation.passes_B.sum()

    model = model_of(cfg)
    prefixes = np.array([[5, 3, a, b] for a, b in itertools.product(range(V), repeat=2)])
    logits = jax.jit(lambda t: model.logits(model(t).hidden_BSD).at[..., PAD].set(-jnp.inf))(prefixes)
    p = np.exp(log_probabilities(logits.reshape(-1, V), sampling)).reshape(logits.shape)
    a, b = prefixes[:, 2], prefixes[:, 3]
    joint = p[np.arange(len(a)), 1, a, None] * p[np.arange(len(a)), 2, b, None] * p[:, 3]
    expected = rows * joint.reshape(-1)
    counts = np.bincount(samples.tokens_BN @ [V * V, V, 1], minlength=V**3)
    assert not counts[expected == 0].any()
    frequent = expected > 5
    observed = [*counts[frequent], counts[~frequent].sum()]
    expected = [*expected[frequent], expected[~frequent].sum()]
    assert len(observed) > 15
    statistic = np.sum((np.array(observed) - expected) ** 2 / np.maximum(expected, 1e-9))
    assert stats.chi2.sf(statistic, len(observed) - 1) > 1e-3


def test_verification_is_exact_whatever_was_drafted():
    """Drafts from q, unlike p and with other zeros: the first token is as p₀ says, the next, if there is one, as p₁."""
    rng, rows = np.random.default_rng(0), 40_000
    p_SV, q_JV = rng.dirichlet(np.full(6, 0.7), size=3), rng.dirichlet(np.full(6, 0.7), size=2)
    p_SV[0, 2] = q_JV[0, 4] = 0
    p_SV, q_JV = (x / x.sum(axis=-1, keepdims=True) for x in (p_SV, q_JV))
    tokens_BJ = np.stack([rng.choice(6, rows, p=q_V) for q_V in q_JV], axis=1)
    with np.errstate(divide="ignore"):
        log_p, log_q = (np.tile(np.log(x), (rows, 1, 1)).astype(np.float32) for x in (p_SV, q_JV))
    drawn = jax.jit(verify)(jax.random.key(0), Drafts(jnp.asarray(tokens_BJ), jnp.asarray(log_q)), jnp.asarray(log_p))
    for place in range(3):
        there = np.asarray(drawn.count_B) > place
        tokens = np.asarray(drawn.tokens_BS)[there, place]
        counts, expected = np.bincount(tokens, minlength=6), len(tokens) * p_SV[place]
        assert len(tokens) > 3000 and not counts[expected == 0].any()
        live = expected > 0
        assert stats.chisquare(counts[live], expected[live]).pvalue > 1e-3
        np.testing.assert_allclose(np.asarray(drawn.logprobs_BS)[there, place], np.log(p_SV[place, tokens]), atol=1e-5)
    for j, share in enumerate(np.minimum(p_SV[:2], q_JV).sum(axis=-1)):
        checked = np.asarray(drawn.count_B) > j
        assert np.mean(np.asarray(drawn.count_B)[checked] > j + 1) == pytest.approx(share, abs=0.02)


def test_drafts_that_agree_are_always_kept():
    p = jnp.log(jnp.full((500, 4, 7), 1 / 7))
    drafts = Drafts(jax.random.randint(jax.random.key(1), (500, 3), 0, 7), p[:, :3])
    drawn = verify(jax.random.key(0), drafts, p)
    assert np.all(drawn.count_B == 4)
    np.testing.assert_array_equal(drawn.tokens_BS[:, :3], drafts.tokens_BJ)


@pytest.mark.parametrize("cfg", [MLA, GQA])
def test_drafts_are_those_of_the_modules_in_training(cfg):
    """The first draft's distribution, pass after pass, against `predict_ahead` over all that was drawn."""
    model, sampling = model_of(cfg), SamplingConfig(N, speculative_tokens=3)
    tokens_PS, mask_PS = pad_prompts(PROMPTS, PAD)

    @jax.jit
    def begin(key):
        decoder = SpeculativeDecoder(model_for_decoding(model), single_modules(model, sampling), sampling, PAD)
        return begin_speculation(model, decoder, jnp.asarray(tokens_PS), jnp.asarray(mask_PS), key, 1, 3 * N)

    @jax.jit
    def step(state, key):
        decoder = SpeculativeDecoder(model_for_decoding(model), single_modules(model, sampling), sampling, PAD)
        return decoder.step(state, key, jnp.ones(len(PROMPTS), bool))

    @jax.jit
    def trained(tokens, segments, positions):
        hidden = model(tokens, segment_ids_BS=segments, positions_BS=positions).hidden_BSD
        ahead = model.predict_ahead(hidden, tokens, segments, positions).hidden_NBSD
        return jax.nn.log_softmax(model.logits(ahead[0]).at[..., PAD].set(-jnp.inf), axis=-1)

    texts = [list(prompt) for prompt in PROMPTS]
    state, drawn = begin(jax.random.key(0))
    counts = set()
    for n in range(5):
        for text, tokens, count in zip(texts, np.asarray(drawn.tokens_BS), np.asarray(drawn.count_B), strict=True):
            text += tokens[:count].tolist()
            counts.add(int(count))
        tokens = np.array([text + [2] * (40 - len(text)) for text in texts], np.int32)
        segments = np.array([[1] * len(text) + [0] * (40 - len(text)) for text in texts], np.int32)
        logprobs = trained(tokens, segments, np.tile(np.arange(40), (len(texts), 1)))
        for b, text in enumerate(texts):
            np.testing.assert_allclose(state.drafts.logprobs_BJV[b, 0], logprobs[b, len(text) - 2], atol=1e-3)
        state, drawn = step(state, jax.random.key(n))
    assert len(counts) > 1


def test_metrics(sampled):
    passes_B, accepted_BJ = sampled.speculation
    metrics = speculation_metrics(sampled)
    accepted_J, passes = accepted_BJ.sum(axis=0), passes_B.sum()
    assert metrics["speculation/acceptance_1"] == accepted_J[0] / passes
    assert metrics["speculation/acceptance_2"] == accepted_J[1] / accepted_J[0]
    assert metrics["speculation/acceptance"] == pytest.approx(accepted_J.sum() / (3 * passes))
    # Tokens behind a stop or the end do not count.
    assert 1 < metrics["speculation/tokens_per_pass"] <= 1 + accepted_J.sum() / passes
    assert np.all(passes_B <= sampled.mask_BN.sum(axis=1) - 1)
    assert speculation_metrics(sampled._replace(speculation=None)) == {}
    assert acceptance(0, 0, np.zeros(2)) == {} and acceptance(4, 4, np.zeros(0)) == {}


def test_streams_give_the_tokens_of_generate():
    definition, params, rest = arrays_of(GQA)
    sampling = SamplingConfig(N, temperature=0.8, speculative_tokens=2)
    stream = Stream(definition, params, rest, sampling, stop_ids=(STOP,), pad_id=PAD)
    tokens = 0
    for seed in range(3):
        samples = draw(GQA, seed=seed, prompts=[[5, 3, 9]], group_size=1, speculative_tokens=2, temperature=0.8)
        completion = list(stream([5, 3, 9], jax.random.key(seed)))
        assert completion == samples.tokens_BN[samples.mask_BN].tolist()
        tokens += len(completion)
    found = stream.acceptance()
    assert stream.tokens == tokens - 3 and found["tokens_per_pass"] == stream.tokens / stream.passes
    full_context = list(stream([4] * 60, jax.random.key(0)))
    assert len(full_context) == 4 or full_context[-1] == STOP


def test_rollouts_draft():
    tokenizer = ByteTokenizer()
    cfg = dataclasses.replace(GQA, vocab_size=tokenizer.vocab_size)
    definition, params, rest = arrays_of(cfg)
    sampling = SamplingConfig(6, temperature=0, speculative_tokens=2)
    prompts = pad_prompts([[65, 66], [67]], tokenizer.pad_id)
    found = [
        make_generator(definition, s, tokenizer, 2)(params, rest, *prompts, jax.random.key(0))
        for s in (sampling, dataclasses.replace(sampling, speculative_tokens=0))
    ]
    np.testing.assert_array_equal(found[0].tokens_BN, found[1].tokens_BN)
    assert found[0].speculation is not None and found[1].speculation is None


@pytest.mark.parametrize(
    ("mtp", "message"),
    [(MTPConfig(), r"none \(mtp.depth 0\): set it to 0"), (MTPConfig(depth=1, kind="parallel"), r"parallel heads")],
)
def test_models_that_cannot_draft_are_refused(mtp, message):
    definition = Definition.of(dataclasses.replace(GQA, mtp=mtp))
    sampling = SamplingConfig(speculative_tokens=2)
    with pytest.raises(ConfigError, match=message):
        Stream(definition, {}, {}, sampling, stop_ids=(), pad_id=PAD)
    with pytest.raises(ConfigError, match=message):
        make_generator(definition, sampling, ByteTokenizer(), 2)
