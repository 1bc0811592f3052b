"""Runs code that a model wrote, and gives what its function returned; the code can do nothing else.

Expected values never leave this process. A program gets arguments and has its results read back as plain JSON, of
limited size; what it prints, its exit code and its signals mean nothing. It runs in a process of its own
(`sandbox_child.py`), fresh for each program, that a seccomp filter lets read and write what is open (nothing but the
pipe for the results), get memory, and end: no files, no network, no processes or threads, no signals. Unlike
namespaces the filter needs no privileges, works inside containers, and binds root; and where there is one process, its
limits of memory and time are the program's. Where bubblewrap (`bwrap`) works, all of it happens inside its namespaces
too. Each sandbox first tries, with a confined process, whether the kernel refuses what it should, and else refuses to
run.

What remains: a fault in the kernel's system calls for memory, and what a program can learn from the time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import queue
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import SandboxConfig
from moe_jax.data import DataError
from moe_jax.data.sandbox_child import decode, encode

_CHILD = Path(__file__).with_name("sandbox_child.py")
_GRACE = 10.0
"""Seconds after which a process that should have answered is taken for lost."""
_LONGEST_CODE = 200_000
_MOST_OUTPUT = 1_000_000


class Program(NamedTuple):
    """A function's source, and the calls to make of it."""

    code: str
    function: str
    calls: Sequence[tuple[Any, ...]]
    """Arguments: None, bool, int, float, str, and lists, tuples, sets and dictionaries of them."""


class Result(NamedTuple):
    """What one call returned: plain values as above. `ok` is False where it raised, ran out of a limit, or returned
    something else; `value` is then None."""

    ok: bool
    value: Any


_FAILED = Result(False, None)


class Sandbox:
    """A pool of processes that run programs. Thread-safe; `close` it, or let it end with this process.

    Raises:
        DataError: this machine cannot confine a program; nothing is ever run without confinement.
    """

    def __init__(self, cfg: SandboxConfig):
        self._cfg = cfg
        self._idle: queue.Queue[_Worker] = queue.Queue()
        first = _Worker(cfg)
        workers = cfg.workers or len(os.sched_getaffinity(0))
        self.isolation = first.isolation
        """"seccomp", or "bubblewrap and seccomp"."""
        for worker in (first, *(_Worker(cfg) for _ in range(workers - 1))):
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, "sandbox")

    def run(self, programs: Sequence[Program]) -> list[list[Result]]:
        """Runs programs side by side: for each its calls' results, in order.

        Takes at most (programs / workers + 1) times `SandboxConfig.wall_seconds`, whatever they do.
        """
        return list(self._threads.map(self._run, programs))

    def close(self) -> None:
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().close()

    def _run(self, program: Program) -> list[Result]:
        worker = self._idle.get()
        try:
            if len(program.code) > _LONGEST_CODE:
                return [_FAILED] * len(program.calls)
            lines = worker.run(program).split(b"\n")[:-1]
        except OSError:  # the worker was killed, for want of memory for one
            worker.close()
            worker, lines = _Worker(self._cfg), []
        finally:
            self._idle.put(worker)
        results = [_read(line) for line in lines[: len(program.calls)]]
        return results + [_FAILED] * (len(program.calls) - len(results))


def _read(line: bytes) -> Result:
    """A line of a program's, which may be anything."""
    try:
        content = json.loads(line)
        return Result(True, decode(content[0])) if isinstance(content, list) and len(content) == 1 else _FAILED
    except (ValueError, TypeError, KeyError, RecursionError):
        return _FAILED


def same_value(value: Any, expected: Any) -> bool:
    """Equal as plain values: floats to 1e-6 (relative, or absolute below 1), a tuple as a list, True as no number."""
    if isinstance(value, bool) or isinstance(expected, bool) or value is None or expected is None:
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        if isinstance(value, int) and isinstance(expected, int):
            return value == expected
        with contextlib.suppress(OverflowError):  # an integer beyond all floats
            return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)
        return False
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same_value(value[key], expected[key]) for key in expected)
    if isinstance(value, set | frozenset) and isinstance(expected, set | frozenset):
        return value == expected
    return isinstance(value, str) and value == expected


class _Worker:
    """The process that forks a confined one for each program, and the socket to it."""

    def __init__(self, cfg: SandboxConfig):
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
            raise DataError(
                f"code can be run on Linux on x86_64 or aarch64 only, this is {sys.platform} on {platform.machine()}:"
                " nothing here confines it; use a virtual machine or a container with Linux"
            )
        self._cfg = cfg
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        limits = {"memory": cfg.memory_mb << 20, "seconds": cfg.seconds, "wall_seconds": cfg.wall_seconds}
        python = os.path.realpath(sys.executable)
        prefix = [] if (bubblewrap := _bubblewrap(python)) is None else bubblewrap
        self.isolation = "bubblewrap and seccomp" if prefix else "seccomp"
        command = [*prefix, python, "-sSPB", "-c", _source(), str(theirs.fileno()), json.dumps(limits)]
        with theirs:
            self._process = subprocess.Popen(
                command,
                env=_environment(),
                cwd="/",
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._control = ours
        ours.settimeout(3 * _GRACE)
        try:
            found = ours.recv(1000).decode() or "its process ended at once"
        except OSError as error:
            found = str(error)
        if found != "ready":
            self.close()
            raise DataError(
                f"code that a model wrote is not run here, since it cannot be confined ({found}): use Linux"
                " 5.3 or later, in a container one that permits seccomp filters"
            )
        ours.settimeout(_GRACE)

    def run(self, program: Program) -> bytes:
        """What the program wrote to its pipe: at most a megabyte, in at most `wall_seconds`.

        Raises:
            OSError: the worker is lost.
        """
        job, (reader, writer) = os.memfd_create("program"), os.pipe()
        with open(reader, "rb", buffering=0), open(job, "wb", buffering=0) as file:
            try:
                content = {
                    "code": program.code,
                    "function": program.function,
                    "calls": [encode(c) for c in program.calls],
                }
                file.write(json.dumps(content).encode())
                file.seek(0)
                socket.send_fds(self._control, [b"run"], [job, writer])
            finally:
                os.close(writer)
            found = self._read(reader)
            self._control.send(b"stop")
            if self._control.recv(16) != b"done":
                raise ConnectionError("the sandbox's process ended")
        return found

    def _read(self, reader: int) -> bytes:
        found, deadline = bytearray(), time.monotonic() + self._cfg.wall_seconds
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0 and len(found) <= _MOST_OUTPUT:
            if not poll.poll(left * 1000):
                break
            piece = os.read(reader, 1 << 16)
            if not piece:
                break
            found += piece
        return bytes(found[:_MOST_OUTPUT])

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@functools.cache
def _source() -> str:
    return _CHILD.read_text(encoding="utf-8")


def _environment() -> dict[str, str]:
    """Sets of texts have the same order in every process; libraries are found where this process finds them."""
    libraries = {"LD_LIBRARY_PATH": os.environ["LD_LIBRARY_PATH"]} if "LD_LIBRARY_PATH" in os.environ else {}
    return {"PYTHONHASHSEED": "0", **libraries}


@functools.cache
def _bubblewrap(python: str) -> list[str] | None:
    """The command that puts a process into namespaces of its own, with a read-only system; None where it fails."""
    program = shutil.which("bwrap")
    if program is None:
        return None
    command = [program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in _environment().items():
        command += ["--setenv", name, value]
    for folder in ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", sys.base_prefix):
        command += ["--ro-bind-try", folder, folder]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/", "--"]
    try:
        tried = subprocess.run([*command, python, "-sSc", ""], capture_output=True, timeout=_GRACE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return command if tried.returncode == 0 else None
