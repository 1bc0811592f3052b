"""Models with random weights, made without compiling an initialiser."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.definition import Definition


def _random_model(cfg, seed=0):
    definition, rng = Definition.of(cfg), np.random.default_rng(seed)
    arrays = {}
    for name, variable in definition.variables.items():
        center = 1.0 if "norm" in name else 0.0
        arrays[name] = jnp.asarray(center + 0.3 * rng.normal(size=variable.shape), variable.dtype)
    params = {name: arrays.pop(name) for name in definition.param_names}
    return definition.merge(params, arrays)


@pytest.fixture(scope="session")
def random_model():
    """random_model(cfg, seed=0): a `Transformer` whose weights, norms and biases are all far from their start."""
    return _random_model
