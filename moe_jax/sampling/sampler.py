"""Prompts in, completions and their log-probabilities out.

P prompts, G samples per prompt, B rows (P·G), S prompt columns, N new columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.config import SamplingConfig
from moe_jax.model.attention import Entries
from moe_jax.model.transformer import Cache, Transformer, make_cache


class Samples(NamedTuple):
    """Completions; row p·G + g is sample g of prompt p."""

    tokens_BN: Array
    """int32; the stop token is the last one of a row, after it comes `pad_id`."""
    logprobs_BN: Array
    """float32, each token's log-probability under the distribution that it was drawn from; 0 after the end."""
    mask_BN: Array
    """bool, True for tokens that were drawn, the stop token included."""
    finished_B: Array
    """bool, whether the row drew a stop token; False if it was cut off at `max_new_tokens`."""


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded tokens [P, S] int32 and their mask [P, S] bool.

    Raises:
        ValueError: a prompt is empty, or longer than `length`.
    """
    longest = max(len(prompt) for prompt in prompts)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a prompt has {longest} tokens and the room for prompts is {length}: shorten it")
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("an empty prompt: begin it with the tokenizer's <bos>")
    tokens_PS = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in zip(tokens_PS, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    mask_PS = np.arange(length) >= length - np.array([len(prompt) for prompt in prompts])[:, None]
    return tokens_PS, mask_PS


def generate(
    model: Transformer,
    tokens_PS: Array,
    mask_PS: Array,
    key: Array,
    cfg: SamplingConfig,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    group_size: int = 1,
) -> Samples:
    """Samples `group_size` completions of each prompt; pure, to be jitted with the config, the ids and the size static.

    A prompt is prefilled once and its cache copied to its group. Decoding ends when every row has drawn a stop token.
    `pad_id` is never drawn: it has probability 0 here, and must have in training too (`banned_ids` of
    `ops.token_logprobs`).

    Args:
        model: dense or sparse, MLA or GQA.
        tokens_PS: int32 prompts, padded on either side.
        mask_PS: bool, False for padding.
        key: one random key; row b's token n depends on the key, b and n alone.
        cfg: temperature and truncation; temperature 0 is greedy.
        stop_ids: tokens that end a completion.
        pad_id: fills rows after their end.
        group_size: G.
    """
    P, S = tokens_PS.shape
    B, N = P * group_size, cfg.max_new_tokens
    if model.cfg.max_position < S + N:
        raise ValueError(
            f"prompts of {S} tokens and {N} new ones exceed the model's context of {model.cfg.max_position}:"
            " shorten the prompt, or lower max_new_tokens, or raise model.max_position"
        )
    prefilled = model(
        tokens_PS, segment_ids_BS=mask_PS.astype(jnp.int32), cache=make_cache(model.cfg, P, S), prefill=True
    )
    assert prefilled.cache is not None
    last_P = S - 1 - jnp.argmax(mask_PS[:, ::-1], axis=1)
    hidden_PD = jnp.take_along_axis(prefilled.hidden_BSD, last_P[:, None, None], axis=1)[:, 0]
    hidden_BD = jnp.repeat(hidden_PD, group_size, axis=0)
    cache = _repeat_and_extend(prefilled.cache, group_size, N)

    def draw(n: Array | int, hidden_BD: Array, samples: Samples) -> Samples:
        logits_BV = model.logits(hidden_BD[:, None])[:, 0].at[:, pad_id].set(-jnp.inf)
        token_B, logprob_B = sample_token(jax.random.fold_in(key, n), logits_BV, cfg)
        alive_B = ~samples.finished_B
        token_B = jnp.where(alive_B, token_B, pad_id)
        stopped_B = jnp.any(token_B[:, None] == jnp.array(stop_ids, jnp.int32), axis=1)

        def put(x_BN: Array, value_B: Array) -> Array:
            return jax.lax.dynamic_update_slice(x_BN, value_B[:, None].astype(x_BN.dtype), (0, n))

        return Samples(
            put(samples.tokens_BN, token_B),
            put(samples.logprobs_BN, jnp.where(alive_B, logprob_B, 0.0)),
            put(samples.mask_BN, alive_B),
            samples.finished_B | stopped_B,
        )

    class State(NamedTuple):
        n: Array
        cache: Cache
        samples: Samples

    def step(state: State) -> State:
        last_B1 = jax.lax.dynamic_slice_in_dim(state.samples.tokens_BN, state.n - 1, 1, axis=1)
        output = model(last_B1, cache=state.cache)
        assert output.cache is not None
        return State(state.n + 1, output.cache, draw(state.n, output.hidden_BSD[:, 0], state.samples))

    empty = Samples(
        jnp.full((B, N), pad_id, jnp.int32), jnp.zeros((B, N)), jnp.zeros((B, N), bool), jnp.zeros((B,), bool)
    )
    state = State(jnp.ones((), jnp.int32), cache, draw(0, hidden_BD, empty))
    state = jax.lax.while_loop(lambda s: (s.n < N) & ~jnp.all(s.samples.finished_B), step, state)
    return state.samples


def _repeat_and_extend(cache: Cache, times: int, columns: int) -> Cache:
    """Each prompt's row `times` times, with room for `columns` more columns."""

    def grow(x_LBT: Array) -> Array:
        x_LBT = jnp.repeat(x_LBT, times, axis=1)
        return jnp.pad(x_LBT, [(0, 0), (0, 0), (0, columns)] + [(0, 0)] * (x_LBT.ndim - 3))

    return Cache(
        Entries(*map(grow, cache.dense)), Entries(*map(grow, cache.moe)), grow(cache.valid_BT[None])[0], cache.length
    )


def sample_token(key: Array, logits_BV: Array, cfg: SamplingConfig) -> tuple[Array, Array]:
    """One token per row and its log-probability under the truncated, tempered distribution; [B] int32, [B] float32.

    Draws by inverting the cumulative distribution: one random number per row, and a token of probability 0 is never
    drawn.
    """
    if cfg.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
        return token_B, jnp.zeros(token_B.shape)
    logprob_BV = jax.nn.log_softmax(truncate(logits_BV / cfg.temperature, cfg), axis=-1)
    probability_BV = jnp.exp(logprob_BV)
    cumulative_BV = jnp.cumsum(probability_BV, axis=-1)
    uniform_B1 = jax.random.uniform(key, (logits_BV.shape[0], 1)) * cumulative_BV[:, -1:]
    # XLA sums in a tree, whose rounding can give a token of probability 0 a slot, or lower the sum by an ulp.
    reached_BV = (cumulative_BV > uniform_B1) & (probability_BV > 0)
    best_B = jnp.argmax(probability_BV, axis=-1)
    token_B = jnp.where(jnp.any(reached_BV, axis=-1), jnp.argmax(reached_BV, axis=-1), best_B)
    return token_B, jnp.take_along_axis(logprob_BV, token_B[:, None], axis=-1)[:, 0]


def truncate(logits_BV: Array, cfg: SamplingConfig) -> Array:
    """Sets the logits to -inf that top_k, top_p and min_p leave out, in this order; the best token always stays."""
    if cfg.top_k and cfg.top_k < logits_BV.shape[-1]:
        worst_B1 = jax.lax.top_k(logits_BV, cfg.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= worst_B1, logits_BV, -jnp.inf)
    if cfg.top_p < 1:
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        probability_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        rank_BV = jnp.argsort(order_BV, axis=-1)
        keep_BV = jnp.take_along_axis(before_BV < cfg.top_p, rank_BV, axis=-1)
        logits_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
    if cfg.min_p:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(cfg.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return logits_BV
