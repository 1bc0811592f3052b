"""What the benchmarks' reports share."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """The machine that was measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "cores": cores,
        "jax": jax.__version__,
    }


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns end below each other."""
    widths = [max(len(line[n]) for line in [head, *lines]) for n in range(len(head))]
    rows = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *lines])
    return "\n".join(f"  {row}" for row in rows)
