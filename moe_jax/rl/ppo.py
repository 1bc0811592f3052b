"""PPO's critic: a value for the state before each token, and what follows from it.

A separate critic is a second model, which starts as a copy of the policy's trunk with a value head in place of the
vocabulary's; a shared one is a value head on the policy (`grpo.make_loss` trains it with the policy).

B samples, R rows of C samples each (`grpo.shared_rows`), N tokens of a completion.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from moe_jax.config import ModelConfig, RLConfig
from moe_jax.losses.advantages import generalised_advantages, token_rewards, whitened
from moe_jax.losses.critic import explained_variance, value_loss
from moe_jax.model.definition import Arrays, Definition
from moe_jax.rl.grpo import Totals, by_sample, completion_states, totals
from moe_jax.sharding import replicate
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Batch, Loss, LossOutput, TrainState, make_update, start_state


def critic_definition(policy: ModelConfig) -> Definition:
    """The policy's trunk with a value head and no head of its own for the vocabulary."""
    trunk = replace(policy, tie_word_embeddings=True, mtp=replace(policy.mtp, depth=0))
    return Definition.of(trunk, value_head=True)


def with_value_head(definition: Definition, params: Arrays) -> Arrays:
    """The parameters of a model with a value head, of those of one without; a new head says 0."""
    size = definition.cfg.hidden_size
    known = {"value_head_D": jnp.zeros((size,), jnp.float32), **params}
    return {name: known[name] for name in definition.param_names}


def completion_values(definition: Definition, params: Arrays, rest: Arrays, batch: Batch) -> Array:
    """float32 [B, N], the value of the state before each completion token."""
    states = completion_states(definition, params, rest, batch)
    N = batch["drawn_RCN"].shape[2]
    return states.by_token(states.model.values(states.hidden_RXD), batch["drawn_RCN"].shape).reshape(-1, N)


def make_value_loss(definition: Definition, cfg: RLConfig) -> Loss:
    """The loss of a separate critic, per token."""

    def loss(params: Arrays, rest: Arrays, batch: Batch, totals: Totals) -> LossOutput:
        values_BN = completion_values(definition, params, rest, batch)
        batch = by_sample(batch)
        old_BN, returns_BN = batch["values_BN"], batch["returns_BN"]
        value = value_loss(values_BN, old_BN, returns_BN, batch["mask_BN"], cfg.critic.cliprange_value)
        return LossOutput(value.loss.sum / totals.tokens, value.metrics, {}, {})

    return loss


class SeparateCritic:
    """The compiled parts of a critic that is a model of its own."""

    def __init__(self, policy: ModelConfig, cfg: RLConfig):
        self.definition = critic_definition(policy)
        updates = cfg.steps * cfg.num_iterations * cfg.num_minibatches
        self.optimizer = make_optimizer(cfg.critic.optimizer, updates, self.definition)
        loss = make_value_loss(self.definition, cfg)
        self.update = make_update(loss, totals, self.optimizer, accumulation_steps=cfg.accumulation_steps)

    def start(self, params: Arrays, rest: Arrays, mesh: Mesh) -> TrainState:
        """The critic that a policy begins with."""
        rest = {name: rest[name] for name in self.definition.shardings(mesh)[1]}
        return start_state(self.definition, self.optimizer, with_value_head(self.definition, params), rest, mesh)


def make_values(definition: Definition) -> Any:
    """The jitted `completion_values`, whole in every process."""

    @jax.jit
    def values(params: Arrays, rest: Arrays, batch: Batch) -> Array:
        return replicate(completion_values(definition, params, rest, batch))

    return values


def add_token_advantages(
    batch: dict[str, np.ndarray],
    rewards_B: np.ndarray,
    penalties_BN: np.ndarray | float,
    values_BN: np.ndarray,
    cfg: RLConfig,
) -> dict[str, float]:
    """Adds values, returns and advantages of each token to a step's batch; returns the critic's metrics.

    `penalties_BN` is beta · KL, where that is in the rewards.
    """
    mask_BN = jnp.asarray(batch["mask_BN"])
    rewards_BN = token_rewards(jnp.asarray(rewards_B, jnp.float32), mask_BN, jnp.asarray(penalties_BN))
    result = generalised_advantages(rewards_BN, jnp.asarray(values_BN), mask_BN, cfg.critic.gamma, cfg.critic.lam)
    advantages_BN = result.advantages_BS
    if cfg.loss.scale_rewards == "batch":
        advantages_BN = whitened(advantages_BN, mask_BN)
    batch |= {
        "values_BN": np.asarray(values_BN),
        "returns_BN": np.asarray(result.returns_BS),
        "advantages_BN": np.asarray(advantages_BN),
    }
    explained = explained_variance(jnp.asarray(values_BN), result.returns_BS, mask_BN)
    return {"critic/explained_variance": float(explained)}
