"""Prompts in, completions and their log-probabilities out.

P prompts, G samples per prompt, B rows (P·G), W slots (rows decoded at a time), S prompt columns, N new columns,
V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.config import SamplingConfig
from moe_jax.model.attention import Entries
from moe_jax.model.block import own_cache, rows_of
from moe_jax.model.transformer import Cache, Transformer, make_cache, make_entries, unrolled_cache
from moe_jax.sampling.distribution import token_at
from moe_jax.sampling.speculative import Drawn, SpeculativeDecoder, State, check_can_draft, single_modules


class Speculation(NamedTuple):
    """How often drafts were kept."""

    passes_B: Array
    """int32, passes of the model over each row after its first token."""
    accepted_BJ: Array
    """int32, passes in which draft j, and with it those before, was kept."""


def acceptance(passes: int, tokens: int, accepted_J: np.ndarray) -> dict[str, float]:
    """What drafts are worth; empty without drafts.

    `tokens_per_pass` (plain decoding: 1), `acceptance` (share of the drafts that were kept) and, by place j from 1,
    `acceptance_<j>` (share kept of the drafts j before which all were).

    Args:
        passes: of the model over a row, after the row's first token.
        tokens: that came of them; not those behind a stop token.
        accepted_J: passes in which draft j, and with it those before, was kept.
    """
    if not len(accepted_J) or not passes:
        return {}
    checked_J = [passes, *accepted_J[:-1]]
    by_place = enumerate(zip(accepted_J, checked_J, strict=True), start=1)
    return {
        "tokens_per_pass": float(tokens / passes),
        "acceptance": float(np.mean(accepted_J) / passes),
        **{f"acceptance_{j}": float(accepted / checked) for j, (accepted, checked) in by_place if checked},
    }


def speculation_metrics(samples: Samples) -> dict[str, float]:
    """`acceptance` over all rows, for metrics; empty without drafts."""
    if samples.speculation is None:
        return {}
    passes_B, accepted_BJ = samples.speculation
    drawn_later = int(np.sum(samples.mask_BN)) - len(samples.mask_BN)
    found = acceptance(int(np.sum(passes_B)), drawn_later, np.sum(accepted_BJ, axis=0))
    return {f"speculation/{name}": value for name, value in found.items()}


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
    speculation: Speculation | None = None
    """What became of the drafts; None if there were none."""


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
    With `cfg.slots` rows wait for a place among those that are decoded; with `cfg.compactions` finished rows are
    dropped on the way.
    With `cfg.speculative_tokens` the tokens are other ones than without, from the same distribution; at temperature 0
    they are the same.
    `pad_id` is never drawn: it has probability 0 here, and must have in training too (`banned_ids` of
    `ops.token_logprobs`).

    Args:
        model: dense or sparse, MLA or GQA.
        tokens_PS: int32 prompts, padded on either side.
        mask_PS: bool, False for padding.
        key: one random key; what row b draws depends on the key and b, not on other rows.
        cfg: temperature and truncation; temperature 0 is greedy.
        stop_ids: tokens that end a completion.
        pad_id: fills rows after their end.
        group_size: G.
    """
    S, N = tokens_PS.shape[1], cfg.max_new_tokens
    check_can_draft(model.cfg, cfg)
    if model.cfg.max_position < S + N:
        raise ValueError(
            f"prompts of {S} tokens and {N} new ones exceed the model's context of {model.cfg.max_position}:"
            " shorten the prompt, or lower max_new_tokens, or raise model.max_position"
        )
    decode = _generate_speculatively if cfg.speculative_tokens else _generate
    return decode(model, tokens_PS, mask_PS, key, cfg, stop_ids, pad_id, group_size)


def _generate(
    model: Transformer,
    tokens_PS: Array,
    mask_PS: Array,
    key: Array,
    cfg: SamplingConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
    group_size: int,
) -> Samples:
    (P, S), N, B = tokens_PS.shape, cfg.max_new_tokens, len(tokens_PS) * group_size
    prefilled = model(
        tokens_PS, segment_ids_BS=mask_PS.astype(jnp.int32), cache=make_cache(model.cfg, P, S), prefill=True
    )
    assert prefilled.cache is not None
    last_P = S - 1 - jnp.argmax(mask_PS[:, ::-1], axis=1)
    hidden_PD = jnp.take_along_axis(prefilled.hidden_BSD, last_P[:, None, None], axis=1)[:, 0]
    decoder = _Decoder(model_for_decoding(model), key, cfg, stop_ids, pad_id, B, S)

    samples = _no_samples(B, N, pad_id)
    samples = decoder.draw(samples, jnp.repeat(hidden_PD, group_size, axis=0), jnp.arange(B))
    width, none = min(cfg.slots or B, B), jnp.zeros((), jnp.int32)
    if width == B:
        lengths = [-(-N * part // cfg.cache_parts) for part in range(1, cfg.cache_parts + 1)]
        slots = _Slots(jnp.arange(B), samples, repeat_and_extend(prefilled.cache, group_size, lengths[0]), none)
        for length, longer in itertools.pairwise(lengths):
            slots = decoder.run(slots, lambda slots, length=length: slots.passes < length)
            slots = slots._replace(cache=_extended(slots.cache, longer - length))
    else:
        prompts, row_W = repeat_and_extend(prefilled.cache, 1, N), jnp.arange(width)
        cache = _by_array(lambda axis, x: jnp.take(x, row_W // group_size, axis=axis), prompts)
        slots = _Slots(row_W, jax.tree.map(lambda x: x[row_W], samples), cache, none)
        slots, samples = _with_waiting(decoder, slots, samples, prompts, group_size)
    sizes = [width]
    while len(sizes) <= cfg.compactions and sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
        if size < width:
            slots = _compacted(slots, size)
        slots = decoder.run(slots, lambda slots, smaller=smaller: jnp.sum(_alive(slots.samples)) > smaller)
        samples = slots.samples if len(slots.row_W) == B else _put_rows(samples, slots)
    return samples


class _Slots(NamedTuple):
    """W rows that are decoded together."""

    row_W: Array
    """int32, which row of the batch each is."""
    samples: Samples
    """Of these rows."""
    cache: Cache
    """A ring of N columns behind the prompts': all slots write into the same one, so that a row which came later has
    its tokens elsewhere than at the ring's beginning."""
    passes: Array
    """int32, of the model so far."""


class _Decoder:
    """Draws tokens and decodes slots; what row b draws as its nth token depends on the key, b and n alone."""

    def __init__(
        self,
        model: Transformer,
        key: Array,
        cfg: SamplingConfig,
        stop_ids: tuple[int, ...],
        pad_id: int,
        rows: int,
        first: int,
    ):
        """`rows` are those of the batch, `first` the column behind the prompts."""
        self.model, self.cfg, self.stop_ids, self.pad_id, self.first = model, cfg, stop_ids, pad_id, first
        keys_N = jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(cfg.max_new_tokens))
        self.uniform_NB = jax.vmap(lambda key: jax.random.uniform(key, (rows, 1)))(keys_N)[..., 0]

    def draw(self, samples: Samples, hidden_BD: Array, row_B: Array) -> Samples:
        """Adds a token to each of these rows that goes on."""
        logits_BV = self.model.logits(hidden_BD[:, None])[:, 0].at[:, self.pad_id].set(-jnp.inf)
        n_B = jnp.minimum(jnp.sum(samples.mask_BN, axis=1), self.cfg.max_new_tokens - 1)
        token_B, logprob_B = token_at(self.uniform_NB[n_B, row_B][:, None], logits_BV, self.cfg)
        drawn = Drawn(token_B[:, None], logprob_B[:, None], jnp.ones(token_B.shape, jnp.int32))
        return _append(samples, drawn, self.stop_ids)

    def run(self, slots: _Slots, goes_on: Callable[[_Slots], Array]) -> _Slots:
        """Decodes while `goes_on` says so and rows are alive."""
        N = self.cfg.max_new_tokens

        def step(slots: _Slots) -> _Slots:
            n_W = jnp.sum(slots.samples.mask_BN, axis=1, keepdims=True)
            last_W1 = jnp.take_along_axis(slots.samples.tokens_BN, n_W - 1, axis=1)
            cache = slots.cache._replace(length=self.first + slots.passes % N)
            output = self.model(last_W1, cache=cache)
            assert output.cache is not None
            samples = self.draw(slots.samples, output.hidden_BSD[:, 0], slots.row_W)
            return slots._replace(samples=samples, cache=output.cache, passes=slots.passes + 1)

        def cond(slots: _Slots) -> Array:
            return jnp.any(_alive(slots.samples)) & goes_on(slots)

        return jax.lax.while_loop(cond, step, slots)


def _with_waiting(
    decoder: _Decoder, slots: _Slots, samples: Samples, prompts: Cache, group_size: int
) -> tuple[_Slots, Samples]:
    """Decodes until no row waits: each takes the place of one that finished. An eighth of the slots, or all rows that
    wait, change at a time, since a change copies the cache."""
    W, B = len(slots.row_W), len(samples.finished_B)

    def change(carry: tuple[_Slots, Samples, Array]) -> tuple[_Slots, Samples, Array]:
        slots, samples, waiting = carry

        def goes_on(slots: _Slots) -> Array:
            return W - jnp.sum(_alive(slots.samples)) < jnp.minimum(max(W // 8, 1), B - waiting)

        slots = decoder.run(slots, goes_on)
        samples = _put_rows(samples, slots)
        free_W = ~_alive(slots.samples)
        next_W = waiting + jnp.cumsum(free_W) - 1
        new_W = free_W & (next_W < B)
        row_W = jnp.where(new_W, next_W, slots.row_W)

        def replaced(axis: int, prompt: Array, x: Array) -> Array:
            shape = [-1 if n == axis else 1 for n in range(x.ndim)]
            return jnp.where(new_W.reshape(shape), jnp.take(prompt, row_W // group_size, axis=axis), x)

        cache = _by_array(replaced, prompts, slots.cache)
        slots = _Slots(row_W, jax.tree.map(lambda x: x[row_W], samples), cache, slots.passes)
        return slots, samples, waiting + jnp.sum(new_W)

    carry = slots, samples, jnp.asarray(W)
    return jax.lax.while_loop(lambda carry: carry[2] < B, change, carry)[:2]


def _compacted(slots: _Slots, size: int) -> _Slots:
    """So many slots, the first of which are those that go on."""
    order_W = jnp.argsort(~_alive(slots.samples), stable=True)[:size]
    cache = _by_array(lambda axis, x: jnp.take(x, order_W, axis=axis), slots.cache)
    return _Slots(slots.row_W[order_W], jax.tree.map(lambda x: x[order_W], slots.samples), cache, slots.passes)


def _extended(cache: Cache, columns: int) -> Cache:
    dense, moe = (jax.tree.map(partial(_more_columns, columns=columns), part) for part in (cache.dense, cache.moe))
    return Cache(dense, moe, jnp.pad(cache.valid_BT, ((0, 0), (0, columns))), cache.length)


def _more_columns(x: Array, columns: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, columns), (0, 0)])


def _put_rows(samples: Samples, slots: _Slots) -> Samples:
    return jax.tree.map(lambda x, slot: x.at[slots.row_W].set(slot), samples, slots.samples)


def _by_array(f: Callable[..., Array], *caches: Cache) -> Cache:
    """`f` of the axis of rows and the caches' arrays, for each of their arrays that has rows."""
    last = caches[-1]
    counts = [len(cache.valid_BT) for cache in caches]

    def entries(*parts: Any) -> Any:
        if not isinstance(parts[0], list):
            return jax.tree.map(lambda *x: f(1, *x), *parts)
        return jax.tree.map(lambda *x: own_cache(f(0, *map(rows_of, x, counts))), *parts)

    dense, moe = (entries(*(getattr(cache, name) for cache in caches)) for name in ("dense", "moe"))
    return Cache(dense, moe, f(0, *(cache.valid_BT for cache in caches)), last.length)


def _generate_speculatively(
    model: Transformer,
    tokens_PS: Array,
    mask_PS: Array,
    key: Array,
    cfg: SamplingConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
    group_size: int,
) -> Samples:
    B, N, J = len(tokens_PS) * group_size, cfg.max_new_tokens, cfg.speculative_tokens
    order_PS = jnp.argsort(mask_PS, axis=1, stable=True)  # padding to the left
    tokens_PS = jnp.take_along_axis(tokens_PS, order_PS, axis=1)
    mask_PS = jnp.take_along_axis(mask_PS, order_PS, axis=1)
    decoder = SpeculativeDecoder(model_for_decoding(model), single_modules(model, cfg), cfg, pad_id)
    state, drawn = begin_speculation(model, decoder, tokens_PS, mask_PS, key, group_size, N)
    samples = _append(_no_samples(B, N, pad_id), drawn, stop_ids)
    speculation = Speculation(jnp.zeros(B, jnp.int32), jnp.zeros((B, J), jnp.int32))

    def step(carry: tuple[State, Samples, Speculation]) -> tuple[State, Samples, Speculation]:
        state, samples, speculation = carry
        alive_B = _alive(samples)
        state, drawn = decoder.step(state, jax.random.fold_in(key, state.passes), alive_B)
        speculation = Speculation(
            speculation.passes_B + alive_B,
            speculation.accepted_BJ + (alive_B[:, None] & (jnp.arange(J) < drawn.count_B[:, None] - 1)),
        )
        return state, _append(samples, drawn, stop_ids), speculation

    carry = (state, samples, speculation)
    _, samples, speculation = jax.lax.while_loop(lambda carry: jnp.any(_alive(carry[1])), step, carry)
    return samples._replace(speculation=speculation)


def begin_speculation(
    model: Transformer,
    decoder: SpeculativeDecoder,
    tokens_PS: Array,
    mask_PS: Array,
    key: Array,
    group_size: int,
    new_tokens: int,
) -> tuple[State, Drawn]:
    """Reads left-padded prompts and draws the first token of each of their samples; there is room for `new_tokens`."""
    P, S = tokens_PS.shape
    prefilled = model(
        tokens_PS, segment_ids_BS=mask_PS.astype(jnp.int32), cache=make_cache(model.cfg, P, S), prefill=True
    )
    assert prefilled.cache is not None
    columns = new_tokens + decoder.num_drafts
    cache = repeat_and_extend(prefilled.cache, group_size, columns)
    start_P = S - jnp.sum(mask_PS, axis=1, dtype=jnp.int32)
    modules = [make_entries(model.cfg, 1, P, S) for _ in decoder.modules]
    modules = decoder.prefill(tokens_PS, start_P, prefilled.hidden_BSD, modules)
    modules = [_module_cache(entries, group_size, columns) for entries in modules]
    last = -len(modules)
    hidden_BWD, tokens_BW, start_B = (
        jnp.repeat(x, group_size, axis=0) for x in (prefilled.hidden_BSD[:, last:], tokens_PS[:, last:], start_P)
    )
    return decoder.begin(jax.random.fold_in(key, 0), hidden_BWD, tokens_BW, start_B, cache, modules)


def _no_samples(rows: int, columns: int, pad_id: int) -> Samples:
    shape = (rows, columns)
    return Samples(jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool), jnp.zeros(rows, bool))


def _alive(samples: Samples) -> Array:
    """[B] bool, whether a row goes on."""
    return ~samples.finished_B & ~samples.mask_BN[:, -1]


def _append(samples: Samples, drawn: Drawn, stop_ids: tuple[int, ...]) -> Samples:
    """Adds what was drawn to the rows that go on, up to the first stop token and as far as there is room."""
    S, N = drawn.tokens_BS.shape[1], samples.tokens_BN.shape[1]
    stops_BS = jnp.any(drawn.tokens_BS[..., None] == jnp.array(stop_ids, jnp.int32), axis=-1)
    stopped_before_BS = jnp.cumsum(stops_BS, axis=1) - stops_BS > 0
    drawn_before_B1 = jnp.sum(samples.mask_BN, axis=1, keepdims=True)
    kept_BS = (jnp.arange(S) < drawn.count_B[:, None]) & ~stopped_before_BS & (drawn_before_B1 + jnp.arange(S) < N)
    kept_BS &= _alive(samples)[:, None]

    def put(x_BN: Array, value_BS: Array) -> Array:
        for s in range(S):  # a scatter would visit row by row on CPUs
            here_BN = (jnp.arange(N) == drawn_before_B1 + s) & kept_BS[:, s : s + 1]
            x_BN = jnp.where(here_BN, value_BS[:, s : s + 1].astype(x_BN.dtype), x_BN)
        return x_BN

    return samples._replace(
        tokens_BN=put(samples.tokens_BN, drawn.tokens_BS),
        logprobs_BN=put(samples.logprobs_BN, drawn.logprobs_BS),
        mask_BN=put(samples.mask_BN, kept_BS),
        finished_B=samples.finished_B | jnp.any(kept_BS & stops_BS, axis=1),
    )


def model_for_decoding(model: Transformer) -> Transformer:
    """The form that decodes fastest: unrolled on CPUs, stacked (small programs) elsewhere."""
    return model.unrolled() if _unrolled() else model


def _unrolled() -> bool:
    return jax.default_backend() == "cpu"


def repeat_and_extend(cache: Cache, times: int, columns: int) -> Cache:
    """Each prompt's row `times` times, with room for `columns` more columns, for the model that decodes."""
    assert isinstance(cache.dense, Entries) and isinstance(cache.moe, Entries)
    dense, moe, valid_BT = (
        jax.tree.map(lambda x, axis=axis: jnp.repeat(x, times, axis=axis), part)
        for part, axis in ((cache.dense, 1), (cache.moe, 1), (cache.valid_BT, 0))
    )
    cache = _extended(Cache(dense, moe, valid_BT, cache.length), columns)
    return unrolled_cache(cache) if _unrolled() else cache


def _module_cache(entries: Entries, times: int, columns: int) -> Entries:
    """The same of a drafting module's, [1, B, ..., T, ·]."""
    entries = jax.tree.map(lambda x: _more_columns(jnp.repeat(x, times, axis=1), columns), entries)
    return jax.tree.map(lambda x: own_cache(x[0]), entries) if _unrolled() else entries
