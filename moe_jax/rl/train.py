"""A phase of policy training: rollout, reference, updates, records; one step is one function.

P prompts, G samples per prompt, B rows (P·G), N tokens of a completion.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moe_jax.config import CheckpointConfig, RLConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.losses.policy import kl_estimate
from moe_jax.model.definition import Arrays, Definition
from moe_jax.rl.dynamic_sampling import filled_rollout
from moe_jax.rl.environments import Environment
from moe_jax.rl.grpo import (
    Drawing,
    Rollout,
    begin_rollout,
    completion_logprobs,
    completion_states,
    finish_rollout,
    make_generator,
    make_loss,
    minibatches,
    packed_rows,
    rollout,
    sample_advantages,
    samples_in_row,
    shared_rows,
    split_rows,
    totals,
)
from moe_jax.rl.ppo import SeparateCritic, add_token_advantages, make_values, with_value_head
from moe_jax.rng import random_key
from moe_jax.sharding import put_batch, replicate, row_devices
from moe_jax.training.experiment import Session
from moe_jax.training.loop import run_phase
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Batch, TrainState, make_update, start_state

PHASES = ("generate", "score", "reference", "update")
"""The parts of a step's time; each has a metric `time/…`, in seconds, and its share of their sum, `time/share/…`.

`reference` is all that the objective asks of models before the updates: the reference's log-probabilities, the policy's
own, the critic's values. With `RLConfig.one_step_off` `generate` is the time that was waited for samples.
"""


class SamplingPolicy(NamedTuple):
    """The policy that the next step's samples come from, with `RLConfig.one_step_off`."""

    step: Array
    """int32, updates before it."""
    params: Arrays


class PolicyState(NamedTuple):
    """What a policy phase saves: a `TrainState`, under the same names, the reference policy, the critic and the policy
    that samples, if that is another one."""

    step: Array
    params: Arrays
    rest: Arrays
    opt_state: optax.OptState
    reference: Arrays
    """Parameters of the reference policy; empty when beta is 0."""
    critic: TrainState | tuple[()] = ()
    """PPO's critic, if it is a model of its own."""
    sampling: SamplingPolicy | tuple[()] = ()

    @property
    def train(self) -> TrainState:
        return TrainState(self.step, self.params, self.rest, self.opt_state)


class PolicyTrainer:
    """The compiled parts of policy training, shared by phases that differ in start or environment only."""

    def __init__(self, definition: Definition, cfg: RLConfig, tokenizer: Tokenizer, prompt_length: int):
        critic = cfg.critic.kind if cfg.loss.baseline == "critic" else None
        if critic == "shared":
            definition = Definition.of(definition.cfg, value_head=True)
        self.definition, self.cfg, self.tokenizer, self.prompt_length = definition, cfg, tokenizer, prompt_length
        updates = cfg.steps * cfg.num_iterations * cfg.num_minibatches
        self.optimizer = make_optimizer(cfg.optimizer, updates, definition)
        loss = make_loss(definition, cfg, tokenizer.pad_id)
        self.update = make_update(loss, totals, self.optimizer, accumulation_steps=cfg.accumulation_steps)
        self.sample = make_generator(definition, cfg.sampling, tokenizer, cfg.group_size)
        self.critic = SeparateCritic(definition.cfg, cfg) if critic == "separate" else None
        self.values = make_values(self.critic.definition if self.critic else definition) if critic else None

        @jax.jit
        def logprobs(params: Arrays, rest: Arrays, batch: Batch) -> Array:
            states = completion_states(definition, params, rest, batch)
            return replicate(completion_logprobs(states, batch, tokenizer.pad_id).logprobs)

        self.logprobs = logprobs
        self.ahead: tuple[tuple[str, int, int], Drawing] | None = None
        """With `one_step_off` the samples of a (phase, step, seed), which may still be drawn."""

    def start(self, params: Arrays, rest: Arrays, mesh: Any) -> PolicyState:
        """The state before the first step: a copy of a model, which is the reference too, and the critic."""
        if self.definition.value_head:
            params = with_value_head(self.definition, params)
        train = start_state(self.definition, self.optimizer, params, rest, mesh)
        reference = jax.tree.map(jnp.copy, train.params) if self.cfg.loss.beta else {}
        critic = self.critic.start(params, rest, mesh) if self.critic else ()
        return PolicyState(*train, reference, critic, _sampling_policy(train) if self.cfg.one_step_off else ())

    def train(
        self,
        session: Session,
        phase: str,
        environment: Environment,
        params: Arrays,
        rest: Arrays,
        *,
        seed: int,
        checkpoint: CheckpointConfig,
    ) -> TrainState:
        """Trains a copy of `params` for `cfg.steps` steps; every sample goes to `rollouts/<phase>/<step>.jsonl`."""
        cfg = self.cfg
        observed: set[int] = set()
        self.ahead = None

        def body(state: PolicyState, step: int) -> tuple[PolicyState, dict[str, Any]]:
            if step and not observed:  # a resumed run: metrics.jsonl has the steps before this one, and no others
                rows = session.run.metrics(phase)
                for row in rows:
                    if cfg.one_step_off and row is rows[-1]:  # asked for problems before it was told of the last step
                        assert state.sampling
                        self.look_ahead(environment, state.sampling.params, state.rest, phase, step, seed)
                    environment.observe(row["step"] - 1, row["rewards/accuracy/mean"])
            observed.add(step)
            state, metrics, rows = self.step(
                environment, state, phase, step, seed, session.mesh, between=session.guard.check
            )
            session.run.write_rows(f"rollouts/{phase}/{step + 1:06d}.jsonl", rows)
            environment.observe(step, metrics["rewards/accuracy/mean"])
            return state, metrics

        state = run_phase(
            session.run,
            session.guard,
            phase,
            cfg.steps,
            self.start(params, rest, session.mesh),
            body,
            checkpoint=checkpoint,
            show=("reward", "rewards/accuracy/mean"),
        )
        return state.train

    def step(
        self,
        environment: Environment,
        state: PolicyState,
        phase: str,
        step: int,
        seed: int,
        mesh: Any,
        between: Callable[[], None] = lambda: None,
    ) -> tuple[PolicyState, dict[str, Any], list[dict[str, Any]]]:
        """Samples, scores and updates once; returns the new state, the metrics and the samples as records.

        `between` is called before the first update, which donates the state.
        """
        cfg, train, reference, critic = self.cfg, state.train, state.reference, state.critic
        if reference and cfg.reference_refresh_steps and step and step % cfg.reference_refresh_steps == 0:
            reference = jax.tree.map(jnp.copy, train.params)

        def sample_batch(number: int) -> Rollout:
            return rollout(
                environment,
                self.sample,
                train.params,
                train.rest,
                self.tokenizer,
                cfg,
                prompt_length=self.prompt_length,
                step=number,
                seed=seed,
                key=random_key(seed, f"rollout/{phase}", number),
            )

        sampling = _sampling_policy(train) if state.sampling else ()
        if state.sampling and sampling:
            samples = self._drawn_before(environment, state, sampling, phase, step, seed)
        else:
            samples = filled_rollout(sample_batch, cfg, step) if cfg.filter_groups else sample_batch(step)
        between()
        started = time.perf_counter()
        metrics = samples.metrics | {"time/reference": 0.0}
        if state.sampling:
            metrics["sampling/staleness"] = float(train.step - state.sampling.step)
        metrics["update_skipped"] = float(_active(samples, cfg) < cfg.min_active_groups)
        if not metrics["update_skipped"]:
            batch, samples, found = self._complete(samples, state._replace(reference=reference), mesh)
            metrics |= found | {"time/reference": time.perf_counter() - started}
            parts = []
            for minibatch in minibatches(shared_rows(batch, samples_in_row(cfg)), cfg, seed, step):
                placed = self._placed(split_rows(minibatch, self._samples_in_row(mesh)), mesh)
                train, part = self.update(train, placed)
                if self.critic and critic:
                    critic, learned = self.critic.update(critic, placed)
                    part |= {name: value for name, value in learned.items() if name.startswith("critic/")}
                    part["critic/grad_norm"] = learned["grad_norm"]
                parts.append(part)
            metrics |= _mean_over_updates(jax.device_get(parts))
        metrics["time/update"] = time.perf_counter() - started - metrics["time/reference"]
        total = sum(metrics[f"time/{phase}"] for phase in PHASES)
        metrics |= {f"time/share/{phase}": metrics[f"time/{phase}"] / total for phase in PHASES}
        metrics["tokens_per_second"] = metrics["num_tokens"] / total
        return PolicyState(*train, reference, critic, sampling), metrics, samples.rows(step + 1)

    def look_ahead(
        self, environment: Environment, params: Arrays, rest: Arrays, phase: str, step: int, seed: int
    ) -> None:
        """Begins to draw a step's samples with these weights."""
        drawing = begin_rollout(
            environment,
            self.sample,
            params,
            rest,
            self.tokenizer,
            self.cfg,
            prompt_length=self.prompt_length,
            step=step,
            key=random_key(seed, f"rollout/{phase}", step),
        )
        self.ahead = (phase, step, seed), drawing

    def _drawn_before(
        self,
        environment: Environment,
        state: PolicyState,
        sampling: SamplingPolicy,
        phase: str,
        step: int,
        seed: int,
    ) -> Rollout:
        """A step's samples, which the policy of the step before has drawn; `sampling` begins to draw the next ones, so
        that they are scored meanwhile."""
        assert state.sampling
        if self.ahead is None or self.ahead[0] != (phase, step, seed):
            self.look_ahead(environment, state.sampling.params, state.rest, phase, step, seed)
        assert self.ahead
        drawing, self.ahead = self.ahead[1], None
        if step + 1 < self.cfg.steps:
            self.look_ahead(environment, sampling.params, state.rest, phase, step + 1, seed)
        return finish_rollout(drawing, environment, self.tokenizer, self.cfg, step=step, seed=seed)

    def _complete(
        self, samples: Rollout, state: PolicyState, mesh: Any
    ) -> tuple[dict[str, np.ndarray], Rollout, dict[str, float]]:
        """A step's batch with what the objective needs of the models as they are before the updates.

        That is the reference's log-probabilities, the trainer's own beside the sampler's, the critic's values, and the
        advantages where these depend on them. Returns the rollout with such advantages, and the metrics found.
        """
        cfg, loss = self.cfg, self.cfg.loss
        batch = samples.batch(cfg.mask_truncated_completions)
        placed = self._placed(shared_rows(batch, self._samples_in_row(mesh)), mesh)
        shape = batch["mask_BN"].shape
        metrics: dict[str, float] = {}
        penalties_BN: np.ndarray | float = 0.0
        if loss.beta:
            ref_logprobs_BN = np.asarray(self.logprobs(state.reference, state.rest, placed)).reshape(shape)
            if loss.kl_in == "loss":
                batch["ref_logprobs_BN"] = ref_logprobs_BN
            else:
                logprobs_BN = jnp.asarray(batch["old_logprobs_BN"])
                kl_BN = kl_estimate(logprobs_BN, jnp.asarray(ref_logprobs_BN), loss.kl_estimator)
                kl_BN = np.where(batch["mask_BN"], kl_BN, 0)
                penalties_BN = loss.beta * kl_BN
                metrics["kl"] = float(np.sum(kl_BN) / max(np.sum(batch["mask_BN"]), 1))
        if loss.sampler_correction != "none":
            batch["sampler_logprobs_BN"] = batch["old_logprobs_BN"]
            batch["old_logprobs_BN"] = np.asarray(self.logprobs(state.params, state.rest, placed)).reshape(shape)
        rewards_B = np.array([part["reward"] for part in samples.parts], np.float32)
        if self.values:
            model = state.critic or state
            values_BN = np.asarray(self.values(model.params, model.rest, placed))
            metrics |= add_token_advantages(batch, rewards_B, penalties_BN, values_BN, cfg)
            means_B = np.sum(batch["advantages_BN"], axis=1) / np.maximum(np.sum(batch["mask_BN"], axis=1), 1)
            samples = samples._replace(advantages_B=means_B)
        elif isinstance(penalties_BN, np.ndarray):
            batch["advantages_B"] = sample_advantages(rewards_B - np.sum(penalties_BN, axis=1), cfg)[0]
            samples = samples._replace(advantages_B=batch["advantages_B"])
        return batch, samples, metrics

    def _placed(self, rows: dict[str, np.ndarray], mesh: Any) -> Batch:
        return put_batch(packed_rows(rows) if self.cfg.pack_completions else rows, mesh)

    def _samples_in_row(self, mesh: Any) -> int:
        """Where sequences are divided over devices, every sample has a row of its own."""
        if mesh.shape["context"] > 1:
            return 1
        return samples_in_row(self.cfg, row_devices(mesh))


def _sampling_policy(train: TrainState) -> SamplingPolicy:
    """A copy, since updates donate their state."""
    return jax.tree.map(jnp.copy, SamplingPolicy(train.step, train.params))


def _active(samples: Rollout, cfg: RLConfig) -> float:
    """The share of groups that teach something: those whose samples differ, if the baseline is the group's."""
    if samples.counted_B is not None:
        return float(np.mean(samples.counted_B))
    return 1 - samples.metrics["frac_reward_zero_std"] if cfg.loss.baseline in ("group", "leave_one_out") else 1.0


def _mean_over_updates(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Each metric's mean over a step's updates; what compares sampler and trainer is of the first update alone."""
    means = {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}
    return means | {name: value for name, value in parts[0].items() if name.startswith("sampling/")}
