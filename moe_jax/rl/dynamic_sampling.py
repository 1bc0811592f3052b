"""Dynamic sampling (DAPO, arXiv:2503.14476 §3.2): a step's batch is filled with groups whose samples differ.

P prompts, G samples per prompt, R batches that were sampled for the step, B rows of a batch (P·G).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from moe_jax.config import RLConfig
from moe_jax.rl.grpo import Rollout, sample_advantages


def filled_rollout(sample_batch: Callable[[int], Rollout], cfg: RLConfig, step: int) -> Rollout:
    """Samples batches until P groups differ in the part `cfg.filter_groups`, at most `cfg.max_num_gen_batches`.

    `sample_batch` takes the number of a step. The step's first batch has its own; the further ones have numbers past
    the run's last step, each used once, so that the regular problems come as they would without filtering.

    Groups that differ come in the order of sampling, and what exceeds P is dropped. If there are too few, groups that
    do not differ fill the batch and the loss does not count them.

    Metrics are means over all samples drawn, the dropped ones too, times and `num_tokens` sums; with them come
    `num_gen_batches` (R), `groups_filtered` (that did not differ) and `groups_missing` (how many the batch lacks).
    """
    size, further = cfg.num_prompts, cfg.max_num_gen_batches - 1
    numbers = [step, *(cfg.steps + step * further + n for n in range(further))]
    rollouts: list[Rollout] = []
    differ: list[bool] = []
    for number in numbers:
        rollouts.append(sample_batch(number))
        parts = rollouts[-1].parts
        groups = [parts[i : i + cfg.group_size] for i in range(0, len(parts), cfg.group_size)]
        differ += [len({part[cfg.filter_groups] for part in group}) > 1 for group in groups]
        if sum(differ) >= size:
            break
    found = min(sum(differ), size)
    chosen = np.argsort(np.logical_not(differ), kind="stable")[:size]  # those that differ first, each kind in order
    rows = (chosen[:, None] * cfg.group_size + np.arange(cfg.group_size)).ravel()

    def take(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate(arrays)[rows]

    parts = [part for rollout in rollouts for part in rollout.parts]
    parts = [parts[row] for row in rows]
    rewards_B = np.array([part["reward"] for part in parts], np.float32)
    metrics = _merged([rollout.metrics for rollout in rollouts])
    metrics |= {
        "num_gen_batches": float(len(rollouts)),
        "groups_filtered": float(len(differ) - sum(differ)),
        "groups_missing": float(size - found),
    }
    return Rollout(
        problems=[[p for rollout in rollouts for p in rollout.problems][group] for group in chosen],
        completions=[[c for rollout in rollouts for c in rollout.completions][row] for row in rows],
        prompts_BS=take(*(rollout.prompts_BS for rollout in rollouts)),
        prompt_mask_BS=take(*(rollout.prompt_mask_BS for rollout in rollouts)),
        samples=jax.tree.map(take, *(rollout.samples for rollout in rollouts)),
        parts=parts,
        advantages_B=sample_advantages(rewards_B, cfg)[0],
        metrics=metrics,
        counted_B=np.repeat(np.arange(size) < found, cfg.group_size),
    )


def _merged(metrics: list[dict[str, float]]) -> dict[str, float]:
    """One of the metrics of several batches of the same size."""
    merged = {}
    for name in metrics[0]:
        values = [m[name] for m in metrics]
        whole = sum if name.startswith("time/") or name == "num_tokens" else np.mean
        whole = {"completions/min_length": min, "completions/max_length": max}.get(name, whole)
        merged[name] = float(whole(values))
    return merged
