"""Freed memory is used again without page faults, on CPUs; elsewhere nothing changes."""

import os
import subprocess
import sys

import pytest

from moe_jax import host_memory

MEASURE = """
import resource, sys
from moe_jax.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.cos(x[:, None] * x) @ jnp.ones((4096, 4)))  # 64 MB of temporaries
x = jnp.ones(4096)
faults = []
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))
"""


def faults(how):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, how], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc alone is told")
def test_steps_touch_no_fresh_pages():
    """Not every step: now and then glibc still takes new ones from the kernel."""
    assert faults("keep") < 0.02 * faults("leave")


def test_where_an_accelerator_may_compute_nothing_changes(monkeypatch):
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: pytest.fail("malloc was changed"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not host_memory.keep_freed_memory()
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert not host_memory.keep_freed_memory()
