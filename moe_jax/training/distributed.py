"""Several processes in one run: they find each other, wait for each other within limits, and name the one that is gone.

JAX's coordination service, in process 0, is the engine: every process sends it heartbeats. One that is killed, loses
its network or is stopped (SIGSTOP) sends none; `heartbeat_seconds` later JAX ends all others with SIGABRT (134)
and "The following tasks are unhealthy (stopped sending heartbeats): 3". Of one that hangs while its heartbeats go on,
`watchdog.py` says so. Then run the same command again: it resumes.
"""

from __future__ import annotations

import atexit
import glob
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np

from moe_jax.config import ConfigError
from moe_jax.training import watchdog

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Set all three to place a process by hand, as `launch.local` does: host:port of process 0, how many, which."""
HEARTBEAT = "MOE_JAX_HEARTBEAT_SECONDS"
"""Changes `heartbeat_seconds` for all processes of a run."""

_STOP = "moe_jax/stop"
_FAILED = 1
_PEER_ERRORS = re.compile(r"gloo|nccl|coordination|connection (closed|reset)|socket closed|broken pipe", re.IGNORECASE)
"""What a collective reports when the other side of a connection is gone."""


class DistributedError(Exception):
    """Processes of a run did not find or did not wait for each other; the message says which, and the remedy."""


def initialize(
    *, start_seconds: int = 300, heartbeat_seconds: int = 60, hang_seconds: int = 1800, shutdown_seconds: int = 120
) -> list[str] | None:
    """Joins this process to its run; call it before anything that touches a device. A process alone: does nothing.

    The environment says who it is: the three variables above, or else what SLURM, GKE and Cloud TPU provide, which
    `jax.distributed.initialize` reads.

    Args:
        start_seconds: How long to wait for the other processes.
        heartbeat_seconds: How long a process may be silent before the others end.
        hang_seconds: How long a process may stay between two safe points before all end (`watchdog.py`).
        shutdown_seconds: How long a process that is done waits for the others.

    Returns:
        "host, pid n" of every process, by process; None if there is only this one.

    Raises:
        ConfigError: the variables contradict each other.
        DistributedError: not all processes came within `start_seconds`.
    """
    arguments = _arguments(os.environ)
    if arguments is None:
        return None
    if text := os.environ.get(HEARTBEAT):
        heartbeat_seconds = _number(HEARTBEAT, text, least=1)
    if text := os.environ.get(watchdog.HANG):
        hang_seconds = _number(watchdog.HANG, text, least=1)
    global _heartbeat_seconds
    _heartbeat_seconds = heartbeat_seconds
    # It would take SIGTERM away from Python's own handlers (`training/signals.py`).
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=shutdown_seconds,
        )
    except (RuntimeError, ValueError) as error:
        expected = arguments.get("num_processes", os.environ.get("SLURM_NTASKS", "several"))
        raise DistributedError(
            f"this process could not join a run of {expected} processes within {start_seconds} s: {error}. Start the"
            f" command on every host at the same time; for one process alone unset {COORDINATOR}, or run outside of"
            " the SLURM step, or on a TPU host set TPU_SKIP_MDS_QUERY=1"
        ) from error
    if _count() == 1:
        return None
    client = _client()
    client.key_value_set(_key(_id()), f"{socket.gethostname()}, pid {os.getpid()}")
    names = []
    for process in range(_count()):
        try:
            names.append(client.blocking_key_value_get(_key(process), 1000 * start_seconds))
        except RuntimeError as error:
            raise DistributedError(f"process {process} of {_count()} did not come within {start_seconds} s") from error
    if _id() == 0:
        listed = "; ".join(f"{process}: {name}" for process, name in enumerate(names))
        print(f"{len(names)} processes: {listed}", file=sys.stderr, flush=True)
    else:
        _watch_coordinator(names[0], heartbeat_seconds)
    watchdog.start(client, _id(), names, hang_seconds)
    return names


def barrier(name: str, seconds: float = 600) -> None:
    """Waits until every process has come here.

    Raises:
        DistributedError: one did not come in time; it says which.
    """
    if not jax.distributed.is_initialized() or _count() == 1:
        return
    watchdog.mark()
    try:
        _client().wait_at_barrier(f"moe_jax/{name}", int(1000 * seconds))
    except RuntimeError as error:
        missing = re.search(r"timed out task names:\s*((?:\d+\s+)+)", str(error))
        # JAX lists some of them, not always all.
        late = sorted(map(int, missing.group(1).split())) if missing else []
        who = " and ".join(f"process {process} ({_name(process)})" for process in late) or f"a process ({error})"
        raise DistributedError(
            f"barrier {name!r}: {who} did not come within {seconds:g} s; look at the end of their logs, then run the"
            " same command again"
        ) from error


@contextmanager
def ending_together(foreseen: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around what a process does after `initialize`: if it fails, so do the others, at once and for a stated reason.
    Of the errors that are `foreseen` the message says all; of others the traceback is printed.

    Python would otherwise wait at its exit for processes that wait for this one. An error that a collective reports
    because a peer is gone does not say which: then JAX's coordination service gets the time to find out and end this
    process with the name. A process alone raises as ever.
    """
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized() or _count() == 1:
            raise
        if isinstance(error, foreseen):
            _say(f"error: {error}")
        else:
            traceback.print_exc()
        if _PEER_ERRORS.search(f"{type(error).__name__} {error}"):
            seconds = _heartbeat_seconds + 5
            _say(f"process {_id()}: lost another process; JAX says which within {seconds} s …")
            time.sleep(seconds)
            _say(f"process {_id()}: every process still answers: one of them failed by itself, see its log")
        else:
            _say(f"process {_id()} of {_count()} failed: {type(error).__name__}; the others end now")
        sys.stdout.flush()
        os._exit(_FAILED)


def gather(value: Any) -> list[Any]:
    """Every process's value (JSON), by process; all must call it, in the same order of calls."""
    if _count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    watchdog.mark()
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - len(text))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths, strict=True)]


class StopAgreement:
    """All processes of a run stop at the same safe point, whichever of them a signal reached, and when.

    Called at every safe point; processes come by the same ones in the same order. The first that has a signal
    announces the point `_AHEAD` later, so that no process has passed it when it hears of it: none is further ahead of
    another than the collectives in flight allow.
    """

    _AHEAD = 8

    def __init__(self) -> None:
        self._point = 0
        self._announced = False

    def __call__(self, signum: int | None) -> int | None:
        """The signal to stop for now, or None to go on; `signum` is what came to this process so far."""
        if _count() == 1:
            return signum
        watchdog.mark()
        self._point += 1
        if signum is not None and not self._announced:
            self._announced = True
            with suppress(Exception):  # another process was first
                _client().key_value_set(_STOP, json.dumps([self._point + self._AHEAD, signum]))
        try:
            point, signum = json.loads(_client().key_value_try_get(_STOP))
        except jax.errors.JaxRuntimeError:  # nobody announced one
            return None
        return signum if self._point >= point else None


_heartbeat_seconds = 0
"""Of this process's run; 0 before `initialize`."""


def _arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What to call `jax.distributed.initialize` with; None for a process alone."""
    ours = {name: environment[name] for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if environment.get(name)}
    if ours:
        if missing := {COORDINATOR, NUM_PROCESSES, PROCESS_ID} - ours.keys():
            raise ConfigError(f"{', '.join(sorted(ours))} set, but not {', '.join(sorted(missing))}: set all or none")
        count = _number(NUM_PROCESSES, ours[NUM_PROCESSES], least=1)
        process = _number(PROCESS_ID, ours[PROCESS_ID], least=0)
        if process >= count:
            raise ConfigError(f"{PROCESS_ID} = {process}: must be below {NUM_PROCESSES} = {count}")
        if not re.fullmatch(r".+:\d+", ours[COORDINATOR]):
            raise ConfigError(f"{COORDINATOR} = {ours[COORDINATOR]}: must be host:port")
        if count == 1:
            return None
        # Without this JAX would ask SLURM for this process's devices.
        return {
            "coordinator_address": ours[COORDINATOR],
            "num_processes": count,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environment:
        return {}
    if "tpu" in environment.get("JAX_PLATFORMS", "tpu"):
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
        if "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1:
            return {}
        chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
        if not hosts and chips and "TPU_SKIP_MDS_QUERY" not in environment and importlib.util.find_spec("libtpu"):
            return {}  # a TPU VM, whose metadata tells JAX of the others
    return None


def _watch_coordinator(name: str, heartbeat_seconds: int) -> None:
    """Says that process 0 is silent before JAX ends this process: JAX's own words would name nobody."""
    client, done = _client(), threading.Event()

    def watch() -> None:
        while not done.wait(heartbeat_seconds / 5):
            try:
                client.blocking_key_value_get(_key(0), 500 * heartbeat_seconds)
            except Exception:
                if not done.is_set():
                    _say(f"error: process 0 ({name}), the coordinator, does not answer: killed, stopped or cut off")
                return

    thread = threading.Thread(target=watch, name="watch-coordinator", daemon=True)
    thread.start()

    @atexit.register  # runs before JAX's own, which lets go of the client
    def _() -> None:
        done.set()
        thread.join()


def _client() -> Any:
    # JAX has no public name for it; Orbax takes it from here too.
    from jax._src.distributed import global_state

    return global_state.client


def _count() -> int:
    from jax._src.distributed import global_state

    return global_state.num_processes  # jax.process_count() would start the devices


def _id() -> int:
    from jax._src.distributed import global_state

    return global_state.process_id


def _key(process: int) -> str:
    return f"moe_jax/processes/{process}"


def _name(process: int) -> str:
    return _client().blocking_key_value_get(_key(process), 1000)


def _number(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} = {text}: must be a whole number, {least} or more")
    return int(text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
