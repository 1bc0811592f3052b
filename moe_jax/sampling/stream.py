"""One completion, token by token, while it is being drawn.

B batch (1 here), S prompt columns, T cache columns, N new columns, J drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.config import SamplingConfig
from moe_jax.model.definition import Arrays, Definition
from moe_jax.model.transformer import Transformer, make_cache
from moe_jax.sampling.distribution import sample_token
from moe_jax.sampling.sampler import (
    acceptance,
    begin_speculation,
    model_for_decoding,
    pad_prompts,
    repeat_and_extend,
)
from moe_jax.sampling.speculative import SpeculativeDecoder, check_can_draft, single_modules

# Prompts are padded to a multiple of this, so that most of them share one compilation.
_BUCKET = 64


class _Drawing(NamedTuple):
    """What one pass leaves to the next."""

    state: Any
    """The cache; with drafts the speculation's state."""
    token: Array
    """The last one, [1]; drafts keep their own."""
    passes: Array
    """int32, of the model after the prefill."""


class Stream:
    """A sampler for one prompt at a time that gives out tokens as soon as they are drawn.

    The tokens are those of `sampler.generate` for this prompt and key. The last one is a stop token, unless the
    completion is cut off at `max_new_tokens` or, other than in `generate`, because the context is full.

    On CPUs it keeps a copy of the layers' weights, one by one. A pass is asked for before the last one's tokens are
    known: one that ends with a stop token leaves a pass over, whose result is dropped.

    Raises:
        ConfigError: the model cannot draft, and is to.
    """

    def __init__(
        self,
        definition: Definition,
        params: Arrays,
        rest: Arrays,
        cfg: SamplingConfig,
        *,
        stop_ids: tuple[int, ...],
        pad_id: int,
    ):
        check_can_draft(definition.cfg, cfg)
        self.cfg, self.stop_ids, self.pad_id = cfg, stop_ids, pad_id
        self.context = definition.cfg.max_position
        self.passes, self.tokens, self.accepted_J = 0, 0, np.zeros(cfg.speculative_tokens, int)
        self._weights = params, rest

        def for_decoding(params: Arrays, rest: Arrays) -> Any:
            model = definition.merge(params, rest)
            return model_for_decoding(model), single_modules(model, cfg)

        # Flat, which is dispatched faster than modules.
        self._decoding, structure = jax.tree.flatten(jax.jit(for_decoding)(params, rest))

        def draw(model: Transformer, hidden_BSD: Array, key: Array, n: Array) -> Array:
            logits_BV = model.logits(hidden_BSD)[:, 0].at[:, pad_id].set(-jnp.inf)
            return sample_token(jax.random.fold_in(key, n), logits_BV, cfg)[0]

        @partial(jax.jit, static_argnames="columns")
        def prefill(
            params: Arrays, rest: Arrays, tokens_BS: Array, mask_BS: Array, key: Array, columns: int
        ) -> tuple[_Drawing, Array]:
            model, n = definition.merge(params, rest), jnp.zeros((), jnp.int32)
            if cfg.speculative_tokens:
                decoder = SpeculativeDecoder(model, single_modules(model, cfg), cfg, pad_id)
                state, drawn = begin_speculation(model, decoder, tokens_BS, mask_BS, key, 1, columns)
                return _Drawing(state, drawn.tokens_BS[0], n), drawn.tokens_BS[0]
            cache = make_cache(definition.cfg, *tokens_BS.shape)
            output = model(tokens_BS, segment_ids_BS=mask_BS.astype(jnp.int32), cache=cache, prefill=True)
            assert output.cache is not None
            token = draw(model, output.hidden_BSD[:, -1:], key, n)
            return _Drawing(repeat_and_extend(output.cache, 1, columns), token, n), token

        @partial(jax.jit, donate_argnames="drawing")
        def step(weights: list[Array], drawing: _Drawing, key: Array) -> tuple[_Drawing, Array]:
            """One pass; drafts that were not kept are -1."""
            (model, modules), n = jax.tree.unflatten(structure, weights), drawing.passes + 1
            if cfg.speculative_tokens:
                decoder = SpeculativeDecoder(model, modules, cfg, pad_id)
                state, drawn = decoder.step(drawing.state, jax.random.fold_in(key, n), jnp.ones(1, bool))
                kept = jnp.where(jnp.arange(cfg.speculative_tokens + 1) < drawn.count_B[0], drawn.tokens_BS[0], -1)
                return _Drawing(state, drawing.token, n), kept
            output = model(drawing.token[None], cache=drawing.state)
            token = draw(model, output.hidden_BSD, key, n)
            return _Drawing(output.cache, token, n), token

        self._prefill, self._step = prefill, step

    def __call__(self, prompt_ids: Sequence[int], key: Array) -> Iterator[int]:
        """The completion's token ids, one by one.

        Raises:
            ValueError: an empty prompt, or one that leaves no room in the model's context; when it is called.
        """
        if len(prompt_ids) >= self.context:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens and the model's context {self.context}, one of them for an"
                " answer: shorten the prompt"
            )
        prompt = pad_prompts([prompt_ids], self.pad_id, -(-len(prompt_ids) // _BUCKET) * _BUCKET)
        return self._tokens(*prompt, key, min(self.cfg.max_new_tokens, self.context - len(prompt_ids)))

    def _tokens(self, tokens_BS: np.ndarray, mask_BS: np.ndarray, key: Array, room: int) -> Iterator[int]:
        columns = min(self.cfg.max_new_tokens, self.context)
        drawing, drawn = self._prefill(*self._weights, tokens_BS, mask_BS, key, columns)
        count = n = 0
        while True:
            # The next pass is asked for before this one's tokens are looked at, so that the device need not wait.
            ahead = None if n + 1 >= room else self._step(self._decoding, drawing, key)
            kept = [token for token in np.asarray(drawn).tolist() if token >= 0]
            self.accepted_J += np.arange(len(self.accepted_J)) < len(kept) - 1
            for token in kept:
                yield token
                count += 1
                self.tokens += n > 0
                if token in self.stop_ids or count == room:
                    return
            assert ahead is not None  # each pass draws a token
            n += 1
            self.passes += 1
            drawing, drawn = ahead

    def acceptance(self) -> dict[str, float]:
        """What became of all drafts so far (`sampler.acceptance`)."""
        return acceptance(self.passes, self.tokens, self.accepted_J)
