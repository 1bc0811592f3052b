"""A model as data: its structure on one side, flat dictionaries of arrays on the other.

`Definition.of(cfg)` costs no memory. `init` makes two dictionaries, name → array: `params`, which are trained, and
`rest`, which is not (router biases). `merge` puts them together to a `Transformer`, inside or outside `jax.jit`; so a
loss is a pure function of (params, rest, batch), and optimizers and checkpoints see plain dictionaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config import ModelConfig, at_precision
from moe_jax.model.transformer import Transformer
from moe_jax.sharding import partition_spec

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Definition:
    """Everything about a model but its numbers."""

    cfg: ModelConfig
    graph: Any
    variables: dict[str, nnx.Variable]
    """Each array's shape, dtype and metadata (`axes`, `roles`), by name, parameters and rest together."""
    value_head: bool
    """Whether it has a second head, of values (`Transformer`)."""

    @classmethod
    def of(cls, cfg: ModelConfig, value_head: bool = False) -> Definition:
        abstract = jax.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0), value_head))
        graph, state = nnx.split(abstract)
        variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
        return cls(cfg, graph, variables, value_head)

    def at(self, precision: str) -> Definition:
        """The same model in the arithmetic that a `TrainConfig.precision` names; its arrays are the same."""
        cfg = at_precision(self.cfg, precision)
        return self if cfg == self.cfg else Definition.of(cfg, self.value_head)

    @property
    def param_names(self) -> list[str]:
        return [name for name, variable in self.variables.items() if isinstance(variable, nnx.Param)]

    def init(self, key: Array, mesh: Mesh | None = None) -> tuple[Arrays, Arrays]:
        """New weights; with a mesh, each is created in its shards and is never whole on one device."""

        def create() -> tuple[Arrays, Arrays]:
            return self.split(Transformer(self.cfg, nnx.Rngs(key), self.value_head))

        return jax.jit(create, out_shardings=self.shardings(mesh) if mesh else None)()

    def split(self, model: Transformer) -> tuple[Arrays, Arrays]:
        """The model's arrays as (params, rest)."""
        flat = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.split(model)[1])}
        params = {name: flat.pop(name) for name in self.param_names}
        return params, flat

    def merge(self, params: Arrays, rest: Arrays) -> Transformer:
        """The model that has these arrays."""
        arrays = {**params, **rest}
        flat: Any = {tuple(name.split(".")): v.replace(arrays[name]) for name, v in self.variables.items()}
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def shardings(self, mesh: Mesh) -> tuple[dict[str, NamedSharding], dict[str, NamedSharding]]:
        """How `params` and `rest` lie on the mesh."""

        def of(names: list[str]) -> dict[str, NamedSharding]:
            return {name: NamedSharding(mesh, self._spec(name, mesh)) for name in names}

        params = self.param_names
        return of(params), of([name for name in self.variables if name not in set(params)])

    def _spec(self, name: str, mesh: Mesh) -> PartitionSpec:
        variable = self.variables[name]
        return partition_spec(variable.get_metadata().get("axes", ()), variable.shape, mesh)
