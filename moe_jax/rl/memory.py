"""What a step of policy training holds and needs in memory, measured (`analysis.rl_cost` computes it)."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax.rl.environments import Environment
from moe_jax.rl.train import PolicyTrainer
from moe_jax.training.state import TrainState


class Planned:
    """A jitted function that knows what memory the compiler planned for it."""

    def __init__(self, function: Any):
        self._function, self._lowered = function, None

    def __call__(self, *arguments: Any) -> Any:
        if self._lowered is None:
            self._lowered = self._function.lower(*arguments)  # before the call, which may donate its arguments
        return self._function(*arguments)

    def new_bytes(self) -> int:
        """Temporaries and results on one device that do not take the place of arguments; 0 if it was not called."""
        if self._lowered is None:
            return 0
        plan = self._lowered.compile().memory_analysis()
        return plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes


def measure_memory(
    trainer: PolicyTrainer, environment: Environment, start: TrainState, seed: int, mesh: Mesh
) -> dict[str, Any]:
    """Takes one step, throws it away, and returns what it held and needed.

    `numbers`: elements of each part of the state. The rest is in bytes of one device: `held` between steps, the start's
    weights included; `planned` for each compiled program, beyond its arguments; `peak_planned`, what is held with the
    most demanding program; `peak_device`, what the allocator saw, None where it does not say (CPUs) or where something
    earlier in this process needed as much.
    """

    def device_peak() -> int | None:
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    before = device_peak()
    state = trainer.start(start.params, start.rest, mesh)
    critic = state.critic or None
    parts = {
        "policy": state.params,
        "reference": state.reference,
        "critic": critic.params if critic else {},
        "optimizer": (state.opt_state, critic.opt_state if critic else ()),
        "start": start.params,
    }
    numbers = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in parts.items()}
    arrays = jax.tree.leaves((state, start.params, start.rest))
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays)

    names = ["sample", "logprobs", "update", *(["values"] if trainer.values else [])]
    programs = {name: Planned(getattr(trainer, name)) for name in names}
    for name, program in programs.items():
        setattr(trainer, name, program)
    if trainer.critic:
        trainer.critic.update = programs["critic_update"] = Planned(trainer.critic.update)  # pyright: ignore
    trainer.step(environment, state, "memory", 0, seed, mesh)
    planned = {name: program.new_bytes() for name, program in programs.items()}
    after = device_peak()
    return {
        "numbers": numbers,
        "held": held,
        "planned": planned,
        "peak_planned": held + max(planned.values()),
        "peak_device": after if after and after > (before or 0) else None,
    }
