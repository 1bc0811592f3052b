"""Self-speculative decoding: the multi-token prediction modules draft, the model checks the drafts in one pass.

The draws are distributed exactly as those of plain decoding (speculative sampling: arXiv:2211.17192, arXiv:2302.01318;
with multi-token prediction modules as draft: DeepSeek-V3 §5.4.3).

Each row keeps its own tokens in successive columns of the cache: a pass writes the last token and J drafts behind
them, and the columns of the drafts that were not kept are written over by the next pass. So rows may keep different
numbers, and the cache has room for prompt, completion and J columns more.

P prompts, B rows, S positions of a pass (J + 1), J drafts, V vocabulary, D model, W last columns of the prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.config import ConfigError, ModelConfig, SamplingConfig
from moe_jax.model.attention import Entries
from moe_jax.model.mtp import MTP
from moe_jax.model.transformer import Cache, Transformer
from moe_jax.sampling.distribution import draw, log_probabilities


class Drafts(NamedTuple):
    tokens_BJ: Array
    logprobs_BJV: Array
    """log q: what each was drawn from."""


class Drawn(NamedTuple):
    """What a pass adds to each row."""

    tokens_BS: Array
    """The drafts that are kept, then the token drawn in place of the first that is not, or after the last of them."""
    logprobs_BS: Array
    """float32, log p of each under the model's own distribution."""
    count_B: Array
    """int32, how many of them are meant; from 1 to J + 1."""


class State(NamedTuple):
    """Between two passes."""

    passes: Array
    cache: Cache
    """Of the model; `length` is each row's own, [B]."""
    modules: list[Entries]
    """Each module's cache, in the same columns."""
    start_B: Array
    """The column at which the row's text begins."""
    last_B: Array
    """The row's last token, which the model has not read yet."""
    drafts: Drafts


def check_can_draft(model: ModelConfig, sampling: SamplingConfig) -> None:
    """
    Raises:
        ConfigError: drafts are asked of a model that has no chain of multi-token prediction modules.
    """
    drafts = sampling.speculative_tokens
    if drafts and (not model.mtp.depth or model.mtp.kind != "causal"):
        what = f"{model.mtp.kind} heads (mtp.kind)" if model.mtp.depth else "none (mtp.depth 0)"
        raise ConfigError(
            f"SamplingConfig.speculative_tokens = {drafts}: drafts come from a chain of multi-token prediction modules,"
            f" and this model has {what}: set it to 0"
        )


def verify(key: Array, drafts: Drafts, logprobs_BSV: Array) -> Drawn:
    """Keeps drafts and draws one more token such that all are distributed as the model's (arXiv:2211.17192, alg. 1).

    Draft x, drawn from q, is kept with probability min(1, p(x) / q(x)). The first that is not is replaced by a draw
    from max(p - q, 0), normalised, and those behind it fall.

    Args:
        key: one random key; row b's draws depend on the key and b alone.
        drafts: the drafts.
        logprobs_BSV: log p at each draft's place, and at the place after the last.
    """
    B, S = logprobs_BSV.shape[:2]
    key_keep, key_draw = jax.random.split(key)
    tokens_BJ1 = drafts.tokens_BJ[..., None]
    p_BJ = jnp.exp(jnp.take_along_axis(logprobs_BSV[:, :-1], tokens_BJ1, axis=-1)[..., 0])
    q_BJ = jnp.exp(jnp.take_along_axis(drafts.logprobs_BJV, tokens_BJ1, axis=-1)[..., 0])
    kept_BJ = jax.random.uniform(key_keep, (B, S - 1)) * q_BJ < p_BJ
    kept_B = jnp.sum(jnp.cumprod(kept_BJ.astype(jnp.int32), axis=1), axis=1)

    at_B11 = kept_B[:, None, None]
    p_BV = jnp.exp(jnp.take_along_axis(logprobs_BSV, at_B11, axis=1)[:, 0])
    # Behind the last draft there is nothing to subtract.
    q_BSV = jnp.pad(jnp.exp(drafts.logprobs_BJV), ((0, 0), (0, 1), (0, 0)))
    rest_BV = jnp.maximum(p_BV - jnp.take_along_axis(q_BSV, at_B11, axis=1)[:, 0], 0)
    # Where p and q agree but for rounding, a draft can fall with nothing left of p.
    rest_BV = jnp.where(jnp.any(rest_BV > 0, axis=-1, keepdims=True), rest_BV, p_BV)
    token_B = draw(key_draw, rest_BV)

    tokens_BS = jnp.pad(drafts.tokens_BJ, ((0, 0), (0, 1))).at[jnp.arange(B), kept_B].set(token_B)
    logprobs_BS = jnp.take_along_axis(logprobs_BSV, tokens_BS[..., None], axis=-1)[..., 0]
    return Drawn(tokens_BS, logprobs_BS, kept_B + 1)


def single_modules(model: Transformer, sampling: SamplingConfig) -> list[MTP]:
    """The modules that draft, each as a chain of one; none without drafts."""
    if not sampling.speculative_tokens:
        return []
    assert isinstance(model.mtp, MTP)
    used = range(min(sampling.speculative_tokens, model.cfg.mtp.depth))
    return [jax.tree.map(lambda x, k=k: x[k : k + 1], model.mtp) for k in used]


class SpeculativeDecoder:
    """Begins and continues completions; pure functions of arrays, to be traced.

    Module k of the chain drafts token k; when more are asked for, the last module goes on from its own output, one
    position further. After each pass the modules read what was kept: the trunk's hidden states and the tokens that
    were drawn. Only where a chain is longer than one, its later modules have read tokens ahead which may have fallen
    since. That can cost acceptance; what is drawn depends on it no more than on any draft.

    Args:
        model: in the form for decoding.
        modules: of its chain, those that draft (`single_modules`).
        cfg: temperature, truncation, number of drafts.
        pad_id: is never drawn.
    """

    def __init__(self, model: Transformer, modules: list[MTP], cfg: SamplingConfig, pad_id: int):
        self.model, self.modules, self.cfg, self.pad_id = model, modules, cfg, pad_id
        self.num_drafts = cfg.speculative_tokens

    def prefill(self, tokens_PS: Array, start_P: Array, hidden_PSD: Array, modules: list[Entries]) -> list[Entries]:
        """The modules' caches of left-padded prompts, but for the last columns: those look at tokens not yet drawn."""
        column_P = jnp.zeros_like(start_P)
        for k, module in enumerate(self.modules):
            ahead_PS = jnp.roll(tokens_PS, -k - 1, axis=1)
            hidden_PSD, modules[k] = self.model.draft(
                module, k, hidden_PSD, tokens_PS, ahead_PS, column_P, start_P, modules[k], prefill=True
            )
        return modules

    def begin(
        self, key: Array, hidden_BWD: Array, tokens_BW: Array, start_B: Array, cache: Cache, modules: list[Entries]
    ) -> tuple[State, Drawn]:
        """Draws the first token, and drafts: the prompts' last W positions, as many as there are modules, are given."""
        key_draw, key_draft = jax.random.split(key)
        logprobs_BV = self._logprobs(hidden_BWD[:, -1:])[:, 0]
        token_B = draw(key_draw, jnp.exp(logprobs_BV))
        logprob_BS = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)
        last_B = jnp.full_like(token_B, tokens_BW.shape[1] - 1)
        cache = cache._replace(length=jnp.broadcast_to(cache.length, token_B.shape))
        first_B = cache.length - tokens_BW.shape[1]
        state = State(jnp.ones((), jnp.int32), cache, modules, start_B, token_B, self._no_drafts(token_B))
        state = self._draft(state, key_draft, hidden_BWD, tokens_BW, first_B, last_B)
        return state, Drawn(token_B[:, None], logprob_BS, jnp.ones_like(token_B))

    def step(self, state: State, key: Array, alive_B: Array) -> tuple[State, Drawn]:
        """One pass: checks the drafts, draws, drafts anew. Rows that are not alive stay where they are."""
        key_verify, key_draft = jax.random.split(key)
        tokens_BS = jnp.concatenate([state.last_B[:, None], state.drafts.tokens_BJ], axis=1)
        column_B = state.cache.length
        output = self.model(tokens_BS, cache=state.cache)
        assert output.cache is not None
        drawn = verify(key_verify, state.drafts, self._logprobs(output.hidden_BSD))
        length_B = column_B + jnp.where(alive_B, drawn.count_B, 0)
        column_T = jnp.arange(output.cache.valid_BT.shape[1])
        valid_BT = (column_T >= state.start_B[:, None]) & (column_T < length_B[:, None])
        last_B = jnp.take_along_axis(drawn.tokens_BS, drawn.count_B[:, None] - 1, axis=1)[:, 0]
        state = state._replace(
            passes=state.passes + 1, cache=output.cache._replace(valid_BT=valid_BT, length=length_B), last_B=last_B
        )
        return self._draft(state, key_draft, output.hidden_BSD, tokens_BS, column_B, drawn.count_B - 1), drawn

    def _draft(
        self, state: State, key: Array, hidden_BSD: Array, tokens_BS: Array, column_B: Array, at_B: Array
    ) -> State:
        """Drafts what follows `state.last_B`.

        The modules first read the positions that the model has just read, from `column_B` on. Of those, `at_B` is the
        last that counts; what they make of later ones is written over in the next pass.
        """
        model, modules, M = self.model, list(state.modules), len(self.modules)
        row_B, S = jnp.arange(len(at_B)), tokens_BS.shape[1]
        ahead = jnp.pad(tokens_BS[:, 1:], ((0, 0), (0, M))).at[row_B, at_B].set(state.last_B)
        tokens, logprobs = [], []
        hidden_B1D = hidden_BSD[:, :1]
        for j in range(self.num_drafts):
            k = min(j, M - 1)
            if j == k:
                hidden_BSD, modules[k] = model.draft(
                    self.modules[k],
                    k,
                    hidden_BSD,
                    tokens_BS,
                    ahead[:, k : k + S],
                    column_B,
                    state.start_B,
                    modules[k],
                )
                hidden_B1D = jnp.take_along_axis(hidden_BSD, at_B[:, None, None], axis=1)
            else:
                further = j - M
                hidden_B1D, modules[k] = model.draft(
                    self.modules[k],
                    k,
                    hidden_B1D,
                    [state.last_B, *tokens][further][:, None],
                    tokens[-1][:, None],
                    column_B + at_B + 1 + further,
                    state.start_B,
                    modules[k],
                )
            logprobs.append(self._logprobs(hidden_B1D)[:, 0])
            tokens.append(draw(jax.random.fold_in(key, j), jnp.exp(logprobs[-1])))
            ahead = ahead.at[row_B, at_B + j + 1].set(tokens[-1], mode="drop")
        drafts = Drafts(jnp.stack(tokens, axis=1), jnp.stack(logprobs, axis=1))
        return state._replace(modules=modules, drafts=drafts)

    def _no_drafts(self, token_B: Array) -> Drafts:
        shape = (len(token_B), self.num_drafts)
        return Drafts(jnp.zeros(shape, token_B.dtype), jnp.zeros((*shape, self.model.cfg.vocab_size)))

    def _logprobs(self, hidden_BSD: Array) -> Array:
        logits_BSV = self.model.logits(hidden_BSD).at[..., self.pad_id].set(-jnp.inf)
        V = logits_BSV.shape[-1]
        return log_probabilities(logits_BSV.reshape(-1, V), self.cfg).reshape(logits_BSV.shape)
