"""One completion, token by token, while it is being drawn.

B batch (1 here), S prompt columns, T cache columns, N new columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.config import SamplingConfig
from moe_jax.model.definition import Arrays, Definition
from moe_jax.model.transformer import Cache, Transformer, make_cache
from moe_jax.sampling.sampler import pad_prompts, sample_token

# Prompts are padded to a multiple of this, so that most of them share one compilation.
_BUCKET = 64

Stream = Callable[[Arrays, Arrays, Sequence[int], Array], Iterator[int]]
"""(params, rest, token ids of the prompt, key) → the completion's token ids, one by one."""


def make_stream(definition: Definition, cfg: SamplingConfig, *, stop_ids: tuple[int, ...], pad_id: int) -> Stream:
    """A sampler for one prompt at a time that gives out each token as soon as it is drawn.

    The tokens are those of `sampler.generate` for this prompt and key. The last one is a stop token, unless the
    completion is cut off at `max_new_tokens` or, other than in `generate`, because the context is full.

    The stream raises ValueError, when it is called, for an empty prompt and for one that leaves no room in the model's
    context.
    """

    def draw(model: Transformer, hidden_BSD: Array, key: Array, n: Array | int) -> Array:
        logits_BV = model.logits(hidden_BSD)[:, 0].at[:, pad_id].set(-jnp.inf)
        return sample_token(jax.random.fold_in(key, n), logits_BV, cfg)[0]

    @partial(jax.jit, static_argnames="columns")
    def prefill(
        params: Arrays, rest: Arrays, tokens_BS: Array, mask_BS: Array, key: Array, columns: int
    ) -> tuple[Array, Cache]:
        model = definition.merge(params, rest)
        cache = make_cache(definition.cfg, 1, columns)
        output = model(tokens_BS, segment_ids_BS=mask_BS.astype(jnp.int32), cache=cache, prefill=True)
        assert output.cache is not None
        return draw(model, output.hidden_BSD[:, -1:], key, 0), output.cache

    @partial(jax.jit, donate_argnames="cache")
    def step(params: Arrays, rest: Arrays, token_B: Array, cache: Cache, key: Array, n: Array) -> tuple[Array, Cache]:
        model = definition.merge(params, rest)
        output = model(token_B[:, None], cache=cache)
        assert output.cache is not None
        return draw(model, output.hidden_BSD, key, n), output.cache

    def stream(params: Arrays, rest: Arrays, prompt_ids: Sequence[int], key: Array) -> Iterator[int]:
        context = definition.cfg.max_position
        if len(prompt_ids) >= context:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens and the model's context {context}, one of them for an answer:"
                " shorten the prompt"
            )
        tokens_BS, mask_BS = pad_prompts([prompt_ids], pad_id, -(-len(prompt_ids) // _BUCKET) * _BUCKET)
        new = min(cfg.max_new_tokens, context - len(prompt_ids))
        columns = tokens_BS.shape[1] + min(cfg.max_new_tokens, context)

        def tokens() -> Iterator[int]:
            token_B, cache = prefill(params, rest, tokens_BS, mask_BS, key, columns)
            for n in range(1, new + 1):
                token = int(token_B[0])
                yield token
                if token in stop_ids or n == new:
                    return
                token_B, cache = step(params, rest, token_B, cache, key, jnp.int32(n))

        return tokens()

    return stream
