"""Everything random comes from one seed, folded by purpose and step."""

from __future__ import annotations

import zlib

import jax
import numpy as np


def random_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator of its own for each seed, purpose and step (and further indices)."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *indices])


def random_key(seed: int, purpose: str, *indices: int) -> jax.Array:
    """A JAX key of its own for each seed, purpose and step (and further indices)."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key
