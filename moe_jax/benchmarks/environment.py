"""The machine that was measured."""

from __future__ import annotations

import os
import platform
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """For the head of a report."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "cores": cores,
        "jax": jax.__version__,
    }
