"""Memory that XLA frees on a CPU stays the process's own."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Of glibc's malloc.h; the numbers are part of its binary interface."""
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


def keep_freed_memory() -> bool:
    """Lets a process that computes on CPUs reuse what it has freed; call it before JAX finds its devices.

    XLA:CPU asks malloc for a program's temporary arrays at each call and frees them at its end. glibc gets such sizes
    from the kernel and gives them back, so that a training step touches fresh pages time and again, each by a fault: on
    two cores a step of `presets.v3_34m` (8 x 256 tokens, 690 MB of temporaries, 170,000 faults) took .71 s, and with
    it .54 s; one in several still faulted. The price: memory that was needed once stays with the process until it ends.

    Does nothing, and returns False, where the C library is not glibc, and where JAX may compute on something else.
    """
    if not sys.platform.startswith("linux"):
        return False
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(importlib.util.find_spec(name) for name in _ACCELERATORS):
        return False
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt")):
        return False
    # Nothing by mmap, nothing given back, and one heap: the others, of threads, are too small for large arrays.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
    return all([libc.mallopt(name, value) == 1 for name, value in settings.items()])
