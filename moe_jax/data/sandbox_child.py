"""The sandbox's other side: a process that forks one confined process for each program. Standard library alone.

`sandbox.py` starts it as `python -c <this file's text> <fd of a socket> <limits as JSON>`. It keeps the modules that a
solution may import, so that a confined process needs no file, and it never reads a program itself: what a program
could find in its memory is this file.
"""

import _strptime  # noqa: F401
import collections
import contextlib
import ctypes
import importlib
import json
import os
import platform
import random
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

_FOR_SOLUTIONS = """
array bisect calendar cmath copy dataclasses datetime decimal enum fractions functools hashlib heapq itertools math
numbers operator re statistics string textwrap time typing unicodedata
"""
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_ALLOWED = {
    # read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn sched_yield mremap
    # madvise getpid exit gettimeofday sigaltstack time restart_syscall clock_gettime clock_getres exit_group getrandom
    "x86_64": (
        0xC000003E,
        (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 39, 60, 96, 131, 201, 219, 228, 229, 231, 318),
    ),
    # the same, less time, which is not there
    "aarch64": (
        0xC00000B7,
        (
            63,
            64,
            57,
            80,
            62,
            222,
            226,
            215,
            214,
            134,
            135,
            139,
            124,
            216,
            233,
            172,
            93,
            169,
            132,
            128,
            113,
            114,
            94,
            278,
        ),
    ),
}
"""By machine: the architecture's number (linux/audit.h) and the system calls that a program may make."""


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return code.to_bytes(2, "little") + bytes([if_true, if_false]) + value.to_bytes(4, "little")


def filter_program() -> bytes:
    """Classic BPF: allow the calls of `_ALLOWED`, kill where the architecture is another, refuse the rest (EPERM)."""
    load, equal, give = 0x20, 0x15, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    architecture, calls = _ALLOWED[platform.machine()]
    program = [
        _instruction(load, 4),
        _instruction(equal, architecture, 1, 0),
        _instruction(give, kill),
        _instruction(load, 0),
    ]
    program += [_instruction(equal, call, len(calls) - place, 0) for place, call in enumerate(calls)]
    return b"".join([*program, _instruction(give, refuse), _instruction(give, allow)])


def confine(memory: int, seconds: int) -> None:
    """From here on this process has no files, no network and no other process to reach, for good.

    The limits bind root too, since they are the filter's and the process's own: with no second process, the limit on
    memory is the whole of it.
    """
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_CORE: 0,
    }
    program = filter_program()
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    argument = _Filter(len(program) // 8, program)
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))
    for arguments in (
        (_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, 2, ctypes.byref(argument), 0, 0),
    ):
        if prctl(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments)):
            raise OSError(ctypes.get_errno(), f"prctl({arguments[0]})")


def encode(value: Any) -> Any:
    """A plain value as JSON, containers with their kind; TypeError for anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for kind in (list, tuple, set, frozenset, dict, collections.deque):
        if isinstance(value, kind):
            items = value.items() if isinstance(value, dict) else value
            return [kind.__name__, [encode(item) for item in items]]
    raise TypeError(f"{type(value).__name__} cannot be compared")


def decode(value: Any) -> Any:
    """What `encode` was given."""
    if not isinstance(value, list):
        return value
    kind, items = value
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "deque": list}
    return kinds[kind](decode(item) for item in items)


def _run(job: int, result: int, memory: int, seconds: int) -> None:
    """Runs one program; a line of JSON for each call says what it returned: [value], or [] where it failed."""
    with open(job, "rb") as file:
        program = json.loads(file.read())
    random.seed(0)  # the module takes new seeds after a fork
    calls = [decode(arguments) for arguments in program["calls"]]
    confine(memory, seconds)
    space: dict[str, Any] = {"__name__": "solution"}
    exec(compile(program["code"], "solution", "exec"), space)
    function = space[program["function"]]
    for arguments in calls:
        try:
            line = json.dumps([encode(function(*arguments))])
        except BaseException:  # of the program's, SystemExit too: the next call is another matter
            line = "[]"
        left = line.encode() + b"\n"
        while left:
            left = left[os.write(result, left) :]


def _check() -> str:
    """What a confined process was not refused; empty if all is well."""
    confine(1 << 30, 10)
    for name, attempt in (
        ("files", lambda: os.open("/dev/null", os.O_RDONLY)),
        ("processes", os.fork),
        ("signals", lambda: os.kill(os.getppid(), 0)),
        ("the network", lambda: os.close(socket.socket().detach())),
    ):
        try:
            attempt()
        except OSError:
            continue
        return f"{name} are not refused"
    return ""


def _in_a_process(work: Callable[[], None], *closed: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    with contextlib.suppress(BaseException):
        for descriptor in closed:
            os.close(descriptor)
        work()
    os._exit(0)


def _serve(control: socket.socket, memory: int, seconds: int, wall_seconds: float) -> None:
    reader, writer = os.pipe()

    def check() -> None:
        try:
            found = _check() or "ready"
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(writer, found.encode())

    os.waitpid(_in_a_process(check), 0)
    os.close(writer)
    control.send(os.read(reader, 1000) or b"the check of the sandbox was killed")
    os.close(reader)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 16, 2)
        if not message:
            return
        if not descriptors:
            continue  # a request to stop what had ended by itself
        job, result = descriptors
        pid = _in_a_process(lambda: _run(job, result, memory, seconds), control.fileno())  # noqa: B023
        os.close(job)
        os.close(result)
        ended = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(control, select.POLLIN)  # a request to stop, or the other side's end
        poll.poll(wall_seconds * 1000)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ended)
        control.send(b"done")


if __name__ == "__main__":
    for module in _FOR_SOLUTIONS.split():
        importlib.import_module(module)
    sys.setrecursionlimit(10_000)
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        _serve(socket.socket(fileno=int(sys.argv[1])), **json.loads(sys.argv[2]))
