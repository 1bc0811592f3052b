"""A ladder of training runs: budgets × families × sizes × seeds, each a configuration that can be trained.

A family is a shape (`matched.Shape`) that every dense model of the ladder's sizes takes at equal cost, so that families
differ in their shape alone. A run's tokens follow from its budget and its own FLOPs per token; its learning rate and
batch from rules, power laws of the budget (DeepSeek LLM, arXiv:2401.02954, §3.1), times factors where they are swept.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from moe_jax.analysis.flops import ParameterCounts, parameter_counts, training_flops_per_token
from moe_jax.analysis.matched import Quantity, Shape, match
from moe_jax.analysis.scaling_law import PowerLaw
from moe_jax.config import ConfigError, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig, to_dict

SHAPES: dict[str, Shape] = {
    "dense": Shape(),
    "sparse": Shape(activation_ratio=1 / 8, granularity=4, num_shared_experts=1),
    "mla": Shape(attention="mla"),
    "gqa": Shape(attention="gqa"),
    "mha": Shape(attention="mha"),
}
"""Families by name. "sparse:granularity=8,attention=mla" changes fields of one."""


@dataclass(frozen=True)
class Ladder:
    """What is trained, but for the seeds."""

    budgets: tuple[float, ...]
    """Training FLOPs of a run, ascending."""
    sizes: tuple[str, ...]
    """Dense models as layers x hidden size ("2x64"), ascending."""
    families: tuple[str, ...] = ("dense", "sparse")
    """Names of `SHAPES`, with fields changed after a colon: "sparse:activation_ratio=1/16,granularity=8"."""
    match_by: Quantity = "flops"
    """What a family's model has in common with the dense one of its size: training FLOPs per token, active parameters
    (without embeddings) or total ones."""
    sizes_per_budget: int = 4
    """Of each family; those whose tokens per parameter are nearest to the next."""
    tokens_per_parameter: float = 20.0
    """Of the dense model, without embeddings: about where the best size is expected."""
    sequence_length: int = 128
    feed_forward_ratio: float = 8 / 3
    """The dense feed-forward's width per hidden size."""
    multiple: int = 1
    """Feed-forward widths are a multiple of this."""
    tolerance: float = 0.05
    """Largest relative error of a match."""
    batch_tokens: PowerLaw = PowerLaw(1024.0, 0.0)
    """Tokens of a step, by budget; rounded to a power of two of rows."""
    learning_rate_dense: PowerLaw = PowerLaw(3e-3, 0.0)
    """Peak learning rate by budget, of families without experts ..."""
    learning_rate_sparse: PowerLaw = PowerLaw(3e-3, 0.0)
    """... and with."""
    learning_rate_factors: tuple[float, ...] = (1.0,)
    """Each configuration is trained with the rule's learning rate times each of these, and the best one counts."""
    batch_factors: tuple[float, ...] = (1.0,)
    """Likewise."""
    warmup_fraction: float = 0.1
    """Share of the steps."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Its learning rate and warmup steps are replaced."""

    def __post_init__(self) -> None:
        if not self.budgets or min(self.budgets) <= 0 or list(self.budgets) != sorted(set(self.budgets)):
            raise ConfigError(f"Ladder.budgets = {self.budgets}: must be positive and ascending")
        if len(set(self.sizes)) != len(self.sizes) or not self.sizes:
            raise ConfigError(f"Ladder.sizes = {self.sizes}: must name at least one, and each once")
        for size in self.sizes:
            parse_size(size)
        if not self.families or len(set(self.families)) != len(self.families):
            raise ConfigError(f"Ladder.families = {self.families}: must name at least one, and each once")
        for family in self.families:
            parse_family(family)
        if not 1 <= self.sizes_per_budget <= len(self.sizes):
            raise ConfigError(
                f"Ladder.sizes_per_budget = {self.sizes_per_budget}: must lie between 1 and the {len(self.sizes)} sizes"
            )
        for name in ("learning_rate_factors", "batch_factors"):
            values = getattr(self, name)
            if not values or min(values) <= 0 or len(set(values)) != len(values):
                raise ConfigError(f"Ladder.{name} = {values}: must be positive, at least one, and each once")
        if self.tokens_per_parameter <= 0 or self.feed_forward_ratio <= 0:
            raise ConfigError("Ladder.tokens_per_parameter and Ladder.feed_forward_ratio must be greater than 0")
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"Ladder.warmup_fraction = {self.warmup_fraction}: must be at least 0 and less than 1")


@dataclass(frozen=True)
class Planned:
    """One run."""

    family: str
    size: str
    budget: float
    """FLOPs asked for; `flops` are what whole steps come to."""
    seed: int
    learning_rate_factor: float
    batch_factor: float
    model: ModelConfig
    train: TrainConfig
    match_by: Quantity
    match_error: dict[str, float]
    """"flops", "active" and "total": this over the dense model's of the same size, minus 1."""
    activation_ratio: float
    """1 for a dense model."""
    granularity: float

    @property
    def name(self) -> str:
        factors = "".join(
            f" {name}×{factor:g}"
            for name, factor in (("lr", self.learning_rate_factor), ("batch", self.batch_factor))
            if factor != 1
        )
        return f"{self.family} {self.size} {self.budget:.3g} FLOPs{factors} seed {self.seed}"

    @property
    def is_sparse(self) -> bool:
        return self.model.moe.num_experts > 0

    @property
    def counts(self) -> ParameterCounts:
        return parameter_counts(self.model)

    @property
    def flops_per_token(self) -> int:
        return training_flops_per_token(self.model, self.train.sequence_length, include_mtp=True)

    @property
    def tokens(self) -> int:
        return self.train.steps * self.train.batch_size * self.train.sequence_length

    @property
    def flops(self) -> float:
        return float(self.tokens * self.flops_per_token)

    def key(self, common: dict[str, Any]) -> str:
        """A hash of all that decides the run's result: its model, its training, its seed, and `common` (data, ...)."""
        decides = {"model": to_dict(self.model), "train": to_dict(self.train), "seed": self.seed, **common}
        return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()


def parse_size(size: str) -> tuple[int, int]:
    """(layers, hidden size) of "2x64".

    Raises:
        ConfigError: it is not written so.
    """
    layers, _, hidden = size.partition("x")
    if not (layers.isdigit() and hidden.isdigit() and int(layers) and int(hidden)):
        raise ConfigError(f"Ladder.sizes: {size!r} must be layers x hidden size, e.g. 2x64")
    return int(layers), int(hidden)


def parse_family(family: str) -> Shape:
    """The shape of "sparse:activation_ratio=1/16,granularity=8".

    Raises:
        ConfigError: an unknown name, field or value; legal ones are listed.
    """
    name, _, changes = family.partition(":")
    if name not in SHAPES:
        raise ConfigError(f"Ladder.families: no family is named {name!r}: there are {', '.join(SHAPES)}")
    types = {field.name: type(getattr(Shape(), field.name)) for field in fields(Shape)}
    values: dict[str, Any] = {}
    for change in filter(None, changes.split(",")):
        field, _, value = change.partition("=")
        if field not in types:
            raise ConfigError(f"Ladder.families: {family!r}: no field {field!r}: there are {', '.join(types)}")
        try:
            values[field] = float(Fraction(value)) if types[field] is float else types[field](value)
        except (ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"Ladder.families: {family!r}: {field} = {value!r} is no number") from error
    return replace(SHAPES[name], **values)


def dense_model(base: ModelConfig, size: str, ladder: Ladder) -> ModelConfig:
    """The dense model of a size: `base` with so many layers, and as many heads of its width as fit the hidden size.

    Raises:
        ConfigError: heads do not fit.
    """
    layers, hidden = parse_size(size)
    a = base.attention
    head = a.head_dim if a.kind == "gqa" else a.v_head_dim
    if hidden % head:
        raise ConfigError(f"Ladder.sizes: {size!r}: {hidden} is no multiple of a head's width, {head}")
    heads = hidden // head
    shared = a.num_heads // a.num_kv_heads if a.kind == "gqa" else 1
    kv_heads = heads // shared if heads % shared == 0 else heads
    return replace(
        base,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=max(1, round(ladder.feed_forward_ratio * hidden / ladder.multiple)) * ladder.multiple,
        first_k_dense=0,
        attention=replace(a, num_heads=heads, num_kv_heads=kv_heads),
        moe=replace(base.moe, num_experts=0),
        max_position=max(base.max_position, ladder.sequence_length),
    )


def plan(ladder: Ladder, base: ModelConfig, seeds: Sequence[int]) -> list[Planned]:
    """All runs, cheapest budget first.

    Args:
        ladder: what to train.
        base: vocabulary, attention, head width, router settings, dtype: what all models share. A sparse model's
            `routed_scaling_factor` is `router.estimated_scaling_factor`'s for its number of experts.
        seeds: of every configuration; the same seed has the same text in the same order in every family.

    Raises:
        ConfigError: a budget too small for one step; a shape that cannot be matched.
    """
    dense = {size: dense_model(base, size, ladder) for size in ladder.sizes}
    runs = []
    for budget, family in itertools.product(ladder.budgets, ladder.families):
        for size in sizes_of(budget, ladder, dense):
            matched = _member(dense[size], parse_family(family), ladder)
            factors = itertools.product(ladder.learning_rate_factors, ladder.batch_factors)
            for (rate_factor, batch_factor), seed in itertools.product(factors, seeds):
                train = _train_config(matched.config, budget, ladder, rate_factor, batch_factor, f"{family} {size}")
                runs.append(
                    Planned(
                        family,
                        size,
                        budget,
                        seed,
                        rate_factor,
                        batch_factor,
                        matched.config,
                        train,
                        ladder.match_by,
                        matched.relative_error,
                        matched.activation_ratio,
                        matched.granularity,
                    )
                )
    return runs


def sizes_of(budget: float, ladder: Ladder, dense: dict[str, ModelConfig]) -> list[str]:
    """The sizes that a budget is spent on, the same for all families: neighbours of the expected best one."""

    def distance(size: str) -> float:
        model = dense[size]
        tokens = budget / training_flops_per_token(model, ladder.sequence_length, include_mtp=True)
        ratio = tokens / parameter_counts(model).active_non_embedding
        return abs(math.log(ratio / ladder.tokens_per_parameter))

    nearest = set(sorted(ladder.sizes, key=distance)[: ladder.sizes_per_budget])
    return [size for size in ladder.sizes if size in nearest]


def shard_of(runs: Sequence[Planned], costs: Sequence[float], shards: int) -> list[int]:
    """Which of so many shards does each run: the dearest first, each to the shard that has least to do.

    A configuration's seeds stay together, so that their program is compiled once.
    """
    groups: dict[tuple, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault((run.family, run.size, run.budget, run.batch_factor), []).append(index)
    load, owner = [0.0] * shards, [0] * len(runs)
    by_cost = sorted(groups.values(), key=lambda group: -sum(costs[index] for index in group))
    for group in by_cost:
        shard = load.index(min(load))
        load[shard] += sum(costs[index] for index in group)
        for index in group:
            owner[index] = shard
    return owner


@functools.cache
def _scaling_factor(moe: MoEConfig) -> float:
    from moe_jax.model.router import estimated_scaling_factor

    return round(estimated_scaling_factor(moe), 3)


def _member(dense: ModelConfig, shape: Shape, ladder: Ladder) -> Any:
    found = match(
        dense,
        shape,
        ladder.match_by,
        sequence_length=ladder.sequence_length,
        multiple=ladder.multiple,
        tolerance=ladder.tolerance,
    )
    if not found.config.moe.num_experts:
        return found
    # The factor does not depend on the experts' width: one simulation for all sizes.
    factor = _scaling_factor(replace(found.config.moe, expert_size=1))
    return replace(found, config=replace(found.config, moe=replace(found.config.moe, routed_scaling_factor=factor)))


def _train_config(
    model: ModelConfig, budget: float, ladder: Ladder, rate_factor: float, batch_factor: float, name: str
) -> TrainConfig:
    rows = batch_factor * ladder.batch_tokens(budget) / ladder.sequence_length
    batch = 2 ** max(0, round(math.log2(rows)))
    per_step = (
        batch * ladder.sequence_length * training_flops_per_token(model, ladder.sequence_length, include_mtp=True)
    )
    steps = round(budget / per_step)
    if steps < 1:
        raise ConfigError(
            f"Ladder.budgets: {budget:.3g} FLOPs are less than one step of {name}, {per_step:.3g}: raise the budget,"
            " lower batch_tokens, or add smaller sizes"
        )
    rule = ladder.learning_rate_sparse if model.moe.num_experts else ladder.learning_rate_dense
    optimizer = replace(
        ladder.optimizer,
        learning_rate=float(f"{rate_factor * rule(budget):.4g}"),
        warmup_steps=max(1, round(ladder.warmup_fraction * steps)),
    )
    return TrainConfig(steps=steps, batch_size=batch, sequence_length=ladder.sequence_length, optimizer=optimizer)
