"""Policy gradients on a `Transformer`: problem → prompts → samples → rewards → advantages → updates.

P prompts, G samples per prompt, B samples (P·G), S tokens of prompt and completion (of `prompts_RS` the prompt's), N
tokens of a completion.

A trainer's batch has R rows of C samples each, which share the row's prompt: P tokens and C·N instead of C·(P + N).
Packed, the samples of a row lie in K ≤ C branches of M columns, several in one where they are short. X are the columns
of a row from which tokens are predicted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.config import RLConfig, SamplingConfig
from moe_jax.data.problem_text import encode_problem
from moe_jax.data.problems import Problem
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.losses import masked_sum
from moe_jax.losses.advantages import group_advantages, soft_overlong_punishment
from moe_jax.losses.balance import RouterLoad, router_load
from moe_jax.losses.critic import value_loss
from moe_jax.losses.policy import policy_loss
from moe_jax.model.definition import Arrays, Definition
from moe_jax.model.transformer import ModelOutput, Transformer
from moe_jax.ops.attention import Branches
from moe_jax.ops.token_logprobs import TokenLogprobs, token_logprobs
from moe_jax.rl.environments import Completion, Environment, Parts
from moe_jax.rng import random_generator
from moe_jax.sampling.sampler import Samples, generate, pad_prompts, speculation_metrics
from moe_jax.sampling.speculative import check_can_draft
from moe_jax.sharding import replicate, token_shards
from moe_jax.training.distributed import gather
from moe_jax.training.state import Batch, Loss, LossOutput


class Totals(NamedTuple):
    """What a minibatch's sums are divided by."""

    tokens: Array
    sequences: Array


def totals(params: Arrays, rest: Arrays, batch: Batch, accumulation_steps: int) -> Totals:
    mask_RCN = batch["mask_RCN"]
    return Totals(
        jnp.maximum(jnp.sum(mask_RCN, dtype=jnp.float32), 1),
        jnp.maximum(jnp.sum(jnp.any(mask_RCN, axis=2), dtype=jnp.float32), 1),
    )


def shared_rows(batch: dict[str, np.ndarray], samples: int) -> dict[str, np.ndarray]:
    """`Rollout.batch` with the prompt of each `samples` successive rows, which have it in common, in one row.

    The arrays of completions become [R, C, ...]; tokens and segments become `prompts_RS`, `prompt_mask_RS` and
    `tokens_RCN`.
    """
    batch = dict(batch)
    N = batch["mask_BN"].shape[1]
    tokens_BS, segment_ids_BS = batch.pop("tokens_BS"), batch.pop("segment_ids_BS")
    batch["tokens_BN"] = tokens_BS[:, -N:]
    rows = {name.replace("_B", "_RC"): x.reshape(-1, samples, *x.shape[1:]) for name, x in batch.items()}
    return rows | {
        "prompts_RS": tokens_BS[::samples, :-N],
        "prompt_mask_RS": segment_ids_BS[::samples, :-N] > 0,
    }


def split_rows(rows: dict[str, np.ndarray], samples: int) -> dict[str, np.ndarray]:
    """The same batch with fewer samples in each row."""
    times = rows["mask_RCN"].shape[1] // samples
    return {
        name: x.reshape(-1, samples, *x.shape[2:]) if "_RC" in name else np.repeat(x, times, axis=0)
        for name, x in rows.items()
    }


def samples_in_row(cfg: RLConfig, devices: int = 1) -> int:
    """How many samples of a group share a row: as many as leave the same number of rows to each micro-batch, and, if
    it has samples for all `devices` over which rows lie, to each of them."""
    if not cfg.share_prompts:
        return 1
    micro = cfg.num_prompts * cfg.group_size // (cfg.num_minibatches * cfg.accumulation_steps)
    whole = math.gcd(cfg.group_size, micro)
    if micro % devices:
        return whole
    return max(C for C in range(1, whole + 1) if whole % C == 0 and micro // C % devices == 0)


def by_sample(batch: Batch) -> Batch:
    """A batch's arrays of completions, [R, C, ...], as [B, ...]."""
    return {name.replace("_RC", "_B"): x.reshape(-1, *x.shape[2:]) for name, x in batch.items() if "_RC" in name}


def packed_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`shared_rows` with short completions one after another in the same branch: the branches' tokens, segments and
    next tokens are added, `branch_…_RKM`, and `place_RCN`, the column X that each completion's token is predicted from.

    All rows have as many branches as that which needs most (first fit, the longest first), in quarters of C, so that at
    most four programs are compiled. Where a row needs all C, nothing is packed.
    """
    drawn_RCN, tokens_RCN = rows["drawn_RCN"], rows["tokens_RCN"]
    R, C, N = drawn_RCN.shape
    M = max(N - 1, 1)
    read_RC = np.maximum(np.sum(drawn_RCN, axis=2) - 1, 0)  # a last token predicts nothing
    places = [_first_fit(read_C, M) for read_C in read_RC]
    quarter = -(-C // 4)
    K = -(-max(bins for _, bins in places) // quarter) * quarter
    if K >= C:
        return rows
    branches = {name: np.zeros((R, K * M), np.int32) for name in ("tokens", "segments", "targets")}
    place_RCN = np.zeros(drawn_RCN.shape, np.int32)
    for r, (first_C, _) in enumerate(places):
        for c, (first, read) in enumerate(zip(first_C, read_RC[r], strict=True)):
            columns = slice(first, first + read)
            branches["tokens"][r, columns] = tokens_RCN[r, c, :read]
            branches["targets"][r, columns] = tokens_RCN[r, c, 1 : read + 1]
            branches["segments"][r, columns] = c + 1
            place_RCN[r, c, 0] = c
            place_RCN[r, c, 1 : read + 1] = C + first + np.arange(read)
    return rows | {f"branch_{k}_RKM": v.reshape(R, K, M) for k, v in branches.items()} | {"place_RCN": place_RCN}


def _first_fit(lengths_C: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Where each length begins among bins of a size, one after another; and how many bins that takes."""
    first_C, used = np.zeros(len(lengths_C), np.int32), [0]
    for c in np.argsort(-lengths_C, kind="stable"):
        fits = [k for k, columns in enumerate(used) if columns + lengths_C[c] <= size]
        k = fits[0] if fits else len(used)
        used += [] if fits else [0]
        first_C[c] = k * size + used[k]
        used[k] += int(lengths_C[c])
    return first_C, len(used)


class CompletionStates(NamedTuple):
    """What a model makes of the places that the completions' tokens were drawn at."""

    model: Transformer
    hidden_RXD: Array
    targets_RX: Array
    """The tokens that were drawn there; after a completion's end, anything."""
    place_RCN: Array | None
    """Which X each completion's token belongs to; None: X is C·N."""
    routers: dict[str, RouterLoad]

    def by_token(self, x_RX: Array, shape: tuple[int, ...]) -> Array:
        """What was found of each place, [R, C, N]; after a completion's end, of any."""
        if self.place_RCN is None:
            return x_RX.reshape(shape)
        return jnp.take_along_axis(x_RX, self.place_RCN.reshape(len(x_RX), -1), axis=1).reshape(shape)


def completion_states(definition: Definition, params: Arrays, rest: Arrays, batch: Batch) -> CompletionStates:
    """The hidden states before each completion token, and the routers' load by the completions' tokens (but the last,
    which no other follows)."""
    model = definition.merge(params, rest)
    prompts_RS, mask_RS, drawn_RCN = batch["prompts_RS"], batch["prompt_mask_RS"], batch["drawn_RCN"]
    (R, C, N), S = drawn_RCN.shape, prompts_RS.shape[1]

    def read(branches_RKM: Array, segments_RKM: Array) -> ModelOutput:
        tokens_RS = jnp.concatenate([prompts_RS, branches_RKM.reshape(R, -1)], axis=1)
        return model.read_branches(tokens_RS, Branches(mask_RS, segments_RKM.astype(jnp.int32)))

    if "place_RCN" in batch:
        output = read(batch["branch_tokens_RKM"], batch["branch_segments_RKM"])
        first_RCD, place_RCN = jnp.repeat(output.hidden_BSD[:, S - 1 : S], C, axis=1), batch["place_RCN"]
        hidden_RXD = jnp.concatenate([first_RCD, output.hidden_BSD[:, S:]], axis=1)
        targets_RX = jnp.concatenate([batch["tokens_RCN"][:, :, 0], batch["branch_targets_RKM"].reshape(R, -1)], axis=1)
    else:
        # A single completion keeps its last token, which nothing is asked of: the row's length may have to divide.
        columns = N if C == 1 else max(N - 1, 1)
        followed_RCN = jnp.pad(drawn_RCN[:, :, 1:], ((0, 0), (0, 0), (0, 1)))[:, :, :columns]
        if C == 1:
            tokens_RS = jnp.concatenate([prompts_RS, batch["tokens_RCN"][:, 0]], axis=1)
            valid_RS = jnp.concatenate([mask_RS, drawn_RCN[:, 0]], axis=1)
            counted_RS = jnp.concatenate([jnp.zeros_like(mask_RS), followed_RCN[:, 0]], axis=1)
            output = model(tokens_RS, segment_ids_BS=valid_RS.astype(jnp.int32), counted_BS=counted_RS)
        else:
            output = read(batch["tokens_RCN"][:, :, :columns], followed_RCN)
        first_RC1D = jnp.repeat(output.hidden_BSD[:, None, S - 1 : S], C, axis=1)
        later_RCND = output.hidden_BSD[:, S:].reshape(R, C, columns, -1)[:, :, : N - 1]
        hidden_RXD = jnp.concatenate([first_RC1D, later_RCND], axis=2).reshape(R, C * N, -1)
        targets_RX, place_RCN = batch["tokens_RCN"].reshape(R, C * N), None
    routers = {} if output.router is None else {"moe_blocks": router_load(output.router)}
    return CompletionStates(model, hidden_RXD, targets_RX, place_RCN, routers)


def completion_logprobs(
    states: CompletionStates, batch: Batch, pad_id: int, with_entropy: bool = False
) -> TokenLogprobs:
    """Log-probabilities (and entropies) of the completions' tokens, [R, C, N]; after their end, anything finite."""
    drawn_RCN, vocabulary = batch["drawn_RCN"], states.model.cfg.vocab_size
    found = token_logprobs(
        states.hidden_RXD,
        states.model.head(),
        jnp.where(states.targets_RX == pad_id, (pad_id + 1) % vocabulary, states.targets_RX),
        banned_ids=(pad_id,),
        shards=token_shards(states.targets_RX.shape),
        with_entropy=with_entropy,
    )
    return TokenLogprobs(*(None if x is None else states.by_token(x, drawn_RCN.shape) for x in found))  # pyright: ignore


def make_loss(definition: Definition, cfg: RLConfig, pad_id: int) -> Loss:
    """The policy objective of `cfg.loss` on batches of `Rollout.batch` made by `shared_rows`.

    RL trains the policy alone: no balance loss, no multi-token prediction; router biases stay as pre-training left
    them, so that the sampler's and the trainer's routing agree. A definition with a value head adds its loss: PPO on a
    shared trunk.
    """

    def loss(params: Arrays, rest: Arrays, batch: Batch, totals: Totals) -> LossOutput:
        states = completion_states(definition, params, rest, batch)
        result = completion_logprobs(states, batch, pad_id, with_entropy=True)
        assert result.entropy is not None
        batch = by_sample(batch)
        mask_BN = batch["mask_BN"]
        logprobs_BN, entropy_BN = (x.reshape(mask_BN.shape) for x in (result.logprobs, result.entropy))
        sampler_logprobs_BN = batch.get("sampler_logprobs_BN", batch["old_logprobs_BN"])
        policy = policy_loss(
            logprobs_BN,
            batch["old_logprobs_BN"],
            batch["advantages_BN"] if "advantages_BN" in batch else batch["advantages_B"],
            mask_BN,
            cfg.loss,
            batch.get("ref_logprobs_BN"),
            sampler_logprobs_BS=batch.get("sampler_logprobs_BN"),
            max_length=cfg.sampling.max_new_tokens,
        )
        count = totals.tokens if cfg.loss.aggregation == "token-mean" else totals.sequences
        difference_BN = jnp.abs(logprobs_BN - sampler_logprobs_BN)
        metrics = policy.metrics | {
            "entropy": masked_sum(entropy_BN, mask_BN),
            "sampling/sampling_logp_difference/mean": masked_sum(difference_BN, mask_BN),
            "sampling/importance_sampling_ratio/mean": masked_sum(
                jnp.exp(jnp.where(mask_BN, logprobs_BN - sampler_logprobs_BN, 0.0)), mask_BN
            ),
        }
        largest = jnp.max(jnp.where(mask_BN, difference_BN, 0.0))
        maxima = {"sampling/sampling_logp_difference/max": jax.lax.stop_gradient(largest)}
        total = policy.loss.sum / count
        if definition.value_head:
            values_BN = states.by_token(states.model.values(states.hidden_RXD), mask_BN.shape)
            old_BN, returns_BN = batch["values_BN"], batch["returns_BN"]
            value = value_loss(values_BN, old_BN, returns_BN, mask_BN, cfg.critic.cliprange_value)
            total += cfg.critic.value_loss_coef * value.loss.sum / totals.tokens
            metrics |= value.metrics
        return LossOutput(total, metrics, states.routers, maxima)

    return loss


class Rollout(NamedTuple):
    """One step's samples, scored. All arrays are on the host."""

    problems: list[Problem]
    completions: list[str]
    prompts_BS: np.ndarray
    prompt_mask_BS: np.ndarray
    samples: Samples
    parts: list[Parts]
    """Per sample: reward, accuracy, format, worked."""
    advantages_B: np.ndarray
    metrics: dict[str, float]
    counted_B: np.ndarray | None = None
    """bool, which rows the loss counts; None: all."""

    def batch(self, mask_truncated: bool) -> dict[str, np.ndarray]:
        """What training needs of each sample; `shared_rows` lays it out for `make_loss`."""
        drawn_BN = np.asarray(self.samples.mask_BN)
        counted_BN = drawn_BN & np.asarray(self.samples.finished_B)[:, None] if mask_truncated else drawn_BN
        if self.counted_B is not None:
            counted_BN = counted_BN & self.counted_B[:, None]
        return {
            "tokens_BS": np.concatenate([self.prompts_BS, self.samples.tokens_BN], axis=1),
            "segment_ids_BS": np.concatenate([self.prompt_mask_BS, drawn_BN], axis=1).astype(np.int32),
            "drawn_BN": drawn_BN,
            "mask_BN": counted_BN,
            "old_logprobs_BN": np.asarray(self.samples.logprobs_BN),
            "advantages_B": self.advantages_B,
        }

    def rows(self, step: int) -> list[dict[str, Any]]:
        """One readable record per sample."""
        group = len(self.completions) // len(self.problems)
        return [
            {
                "step": step,
                "prompt": self.problems[i // group].prompt,
                "answer": self.problems[i // group].answer,
                "completion": completion,
                **self.parts[i],
                "advantage": float(self.advantages_B[i]),
                "tokens": int(np.sum(self.samples.mask_BN[i])),
                "finished": bool(self.samples.finished_B[i]),
            }
            for i, completion in enumerate(self.completions)
        ]


Generator = Callable[[Arrays, Arrays, np.ndarray, np.ndarray, Array], Samples]
"""(params, rest, prompts [P, S], mask [P, S], key) → samples of P·G rows."""


def make_generator(
    definition: Definition, sampling: SamplingConfig, tokenizer: Tokenizer, group_size: int
) -> Generator:
    """The jitted sampler of this model; every process gets all samples."""
    check_can_draft(definition.cfg, sampling)

    @jax.jit
    def run(params: Arrays, rest: Arrays, tokens_PS: Array, mask_PS: Array, key: Array) -> Samples:
        samples = generate(
            definition.merge(params, rest),
            tokens_PS,
            mask_PS,
            key,
            sampling,
            stop_ids=tuple(tokenizer.stop_ids),
            pad_id=tokenizer.pad_id,
            group_size=group_size,
        )
        return replicate(samples)

    return run


def encode_prompts(problems: list[Problem], tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts [P, S] and their mask."""
    return pad_prompts([encode_problem(problem, tokenizer) for problem in problems], tokenizer.pad_id, length)


def decode_completions(samples: Samples, tokenizer: Tokenizer) -> list[str]:
    """Each row's text without its stop token."""
    texts = []
    for tokens, mask, finished in zip(samples.tokens_BN, samples.mask_BN, samples.finished_B, strict=True):
        length = int(np.sum(mask)) - int(finished)
        texts.append(tokenizer.decode(tokens[:length].tolist()))
    return texts


def sample_advantages(rewards_B: np.ndarray, cfg: RLConfig) -> tuple[np.ndarray, dict[str, float]]:
    """Each sample's advantage (with a critic, which has one for each token, its reward) and the rewards' metrics."""
    scale, baseline = cfg.loss.scale_rewards, cfg.loss.baseline
    if baseline == "critic":
        scale = baseline = "none"
    rewards_PG = jnp.asarray(rewards_B.reshape(-1, cfg.group_size))
    advantages_PG, _, metrics = jax.device_get(group_advantages(rewards_PG, scale, baseline))
    return advantages_PG.reshape(-1), {name: float(value) for name, value in metrics.items()}


def rollout(
    environment: Environment,
    sample: Generator,
    params: Arrays,
    rest: Arrays,
    tokenizer: Tokenizer,
    cfg: RLConfig,
    *,
    prompt_length: int,
    step: int,
    seed: int,
    key: Array,
) -> Rollout:
    """Samples a group for each of a step's problems, and scores it; chance depends on seed and step alone."""
    started = time.perf_counter()
    drawing = begin_rollout(
        environment, sample, params, rest, tokenizer, cfg, prompt_length=prompt_length, step=step, key=key
    )
    result = finish_rollout(drawing, environment, tokenizer, cfg, step=step, seed=seed)
    result.metrics["time/generate"] = time.perf_counter() - started - result.metrics["time/score"]
    return result


class Drawing(NamedTuple):
    """Samples that a device may still be drawing."""

    problems: list[Problem]
    prompts_PS: np.ndarray
    mask_PS: np.ndarray
    samples: Samples


def begin_rollout(
    environment: Environment,
    sample: Generator,
    params: Arrays,
    rest: Arrays,
    tokenizer: Tokenizer,
    cfg: RLConfig,
    *,
    prompt_length: int,
    step: int,
    key: Array,
) -> Drawing:
    """The first half of `rollout`: does not wait for the samples."""
    problems = environment.problems(step, cfg.num_prompts)
    prompts_PS, mask_PS = encode_prompts(problems, tokenizer, prompt_length)
    return Drawing(problems, prompts_PS, mask_PS, sample(params, rest, prompts_PS, mask_PS, key))


def finish_rollout(
    drawing: Drawing, environment: Environment, tokenizer: Tokenizer, cfg: RLConfig, *, step: int, seed: int
) -> Rollout:
    """The second half of `rollout`: waits for the samples, which is the metric `time/generate`, and scores them."""
    started = time.perf_counter()
    problems, prompts_PS, mask_PS = drawing[:3]
    samples: Samples = jax.device_get(drawing.samples)
    generated = time.perf_counter()

    completions = decode_completions(samples, tokenizer)
    group = cfg.group_size
    lengths_B = np.sum(samples.mask_BN, axis=1)
    parts = environment.score(
        [
            Completion(
                problems[i // group],
                completion,
                bool(samples.finished_B[i]),
                int(lengths_B[i]),
                cfg.sampling.max_new_tokens,
                random_generator(seed, "reward", step, i),
            )
            for i, completion in enumerate(completions)
        ]
    )
    if cfg.overlong_buffer:
        room = cfg.sampling.max_new_tokens
        punishments_B = cfg.overlong_penalty * soft_overlong_punishment(lengths_B, room, cfg.overlong_buffer)
        parts = [
            {**part, "reward": part["reward"] + float(punishment), "overlong": float(punishment)}
            for part, punishment in zip(parts, punishments_B, strict=True)
        ]
    parts = gather(parts)[0]  # a judge that limits its time may say another thing in another process
    advantages_B, metrics = sample_advantages(np.array([part["reward"] for part in parts], np.float32), cfg)

    for name in parts[0]:
        if name != "reward":
            values = [value for part in parts if (value := part[name]) is not None] or [np.nan]
            metrics[f"rewards/{name}/mean"] = float(np.mean(values))
            metrics[f"rewards/{name}/std"] = float(np.std(values))
    metrics |= {
        "completions/mean_length": float(np.mean(lengths_B)),
        "completions/min_length": float(np.min(lengths_B)),
        "completions/max_length": float(np.max(lengths_B)),
        "completions/clipped_ratio": float(np.mean(~samples.finished_B)),
        "num_tokens": float(np.sum(lengths_B)),
        **speculation_metrics(samples),
        "time/generate": generated - started,
        "time/score": time.perf_counter() - generated,
    }
    return Rollout(
        problems,
        completions,
        np.repeat(prompts_PS, group, axis=0),
        np.repeat(mask_PS, group, axis=0),
        samples,
        parts,
        advantages_B,
        metrics,
    )


def minibatches(batch: dict[str, np.ndarray], cfg: RLConfig, seed: int, step: int) -> list[dict[str, np.ndarray]]:
    """The minibatches of all passes over a step's rows, in the order of their updates."""
    size = len(next(iter(batch.values())))
    if cfg.num_minibatches == 1:
        return [batch] * cfg.num_iterations
    parts = []
    for iteration in range(cfg.num_iterations):
        order = random_generator(seed, "minibatches", step, iteration).permutation(size)
        parts += [{k: v[rows] for k, v in batch.items()} for rows in np.split(order, cfg.num_minibatches)]
    return parts
