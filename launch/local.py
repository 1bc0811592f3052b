"""Runs a command as several processes of one run on this machine.

    python -m launch.local --processes 4 --devices 2 -- -m experiments.pretrain --mesh.data -1

Ctrl-C and SIGTERM go on to every process; a second one, more than a second later, kills them. If a process fails, the
others get the time to say so, and what then still runs is killed. The exit code is that of the first to fail.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import tyro

from launch.command import LaunchError, full_command, run_main

_POLL_SECONDS = 0.05
_REPEAT_SECONDS = 1.0
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Local:
    processes: int
    """How many processes."""
    devices: int = 1
    """Devices of each: simulated ones on CPUs, GPUs of its own on GPUs."""
    platform: Literal["cpu", "gpu"] = "cpu"
    log_dir: Path | None = None
    """Each process writes to process-<n>.log here, and only process 0 to the terminal, too. Without it all do, each
    line with the number of its process."""
    heartbeat_seconds: int = 30
    """A process that is silent for so long is given up by the others (JAX's coordination service)."""
    hang_seconds: int = 1800
    """A process that comes to no safe point for so long, alive as it is, ends the run (`training/watchdog.py`)."""
    grace_seconds: float = 45.0
    """After the first failure: how long the others may take to end. More than `heartbeat_seconds`, so that they can say
    who it was."""
    dry_run: bool = False
    """Only print what would run."""

    def __post_init__(self) -> None:
        for name in ("processes", "devices", "heartbeat_seconds", "hang_seconds"):
            if getattr(self, name) < 1:
                raise LaunchError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.grace_seconds < 0:
            raise LaunchError(f"--grace-seconds {self.grace_seconds:g}: must be 0 or more")


def environment(config: Local, process: int, port: int) -> dict[str, str]:
    """The variables that make a process the n-th of the run (`moe_jax/training/distributed.py` reads them)."""
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",  # not open to the network
        "JAX_NUM_PROCESSES": str(config.processes),
        "JAX_PROCESS_ID": str(process),
        "MOE_JAX_HEARTBEAT_SECONDS": str(config.heartbeat_seconds),
        "MOE_JAX_HANG_SECONDS": str(config.hang_seconds),
        "PYTHONUNBUFFERED": "1",
    }
    if config.platform == "gpu":
        own = range(process * config.devices, (process + 1) * config.devices)
        return variables | {"JAX_PLATFORMS": "cuda", "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own))}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags = f"{flags} --xla_force_host_platform_device_count={config.devices}".strip()
    return variables | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


class Group:
    """The processes of a run, from their start to the end of the last."""

    def __init__(self, config: Local):
        self._config = config
        self._signalled: float | None = None
        self.children: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._output = threading.Lock()

    def start(self, command: Sequence[str]) -> None:
        config, port = self._config, _free_port()
        if config.log_dir is not None:
            config.log_dir.mkdir(parents=True, exist_ok=True)
        for process in range(config.processes):
            if self._signalled is not None:
                break
            # A session each: Ctrl-C in the terminal then reaches them through us alone, and what they start is killed
            # with them.
            child = subprocess.Popen(
                command,
                env=os.environ | environment(config, process, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.children.append(child)
            log = open(config.log_dir / f"process-{process}.log", "w") if config.log_dir else None  # noqa: SIM115 (the reader closes it)
            reader = threading.Thread(target=self._copy, args=(process, child.stdout, log), daemon=True)
            reader.start()
            self._readers.append(reader)

    def on_signal(self, signum: int, _: Any) -> None:
        """The first goes on to the processes, the next kills them."""
        if self._signalled is None:
            self._signalled = time.monotonic()
            self._send(signal.SIGTERM if signum == signal.SIGHUP else signum)
        elif time.monotonic() - self._signalled > _REPEAT_SECONDS:
            _say(f"{signal.Signals(signum).name} again: killing all processes")
            self._send(signal.SIGKILL)

    def wait(self) -> int:
        """Until all have ended; the exit code of the first that failed, 0 if none did."""
        failure, deadline = 0, float("inf")
        open_ = set(range(len(self.children)))
        while open_:
            time.sleep(_POLL_SECONDS)
            ended = {process for process in open_ if self.children[process].poll() is not None}
            open_ -= ended
            # Among those that ended within one look, SIGABRT is how JAX ends the survivors.
            for process in sorted(ended, key=lambda process: self.children[process].returncode == -signal.SIGABRT):
                code = self.children[process].returncode
                if code and not failure:
                    failure, deadline = _exit_code(code), time.monotonic() + self._config.grace_seconds
                    if self._signalled is None:
                        self._report(process, code, open_)
            if failure and self._signalled is None and open_ and all(map(self._is_stopped, open_)):
                deadline = time.monotonic()  # they will not end by themselves
            if time.monotonic() >= deadline:
                names = ", ".join(f"{process} (pid {self.children[process].pid})" for process in sorted(open_))
                if open_:
                    _say(f"still running: process {names}; ending them")
                    self._send(signal.SIGTERM)
                    deadline = time.monotonic() + _KILL_SECONDS
                    while time.monotonic() < deadline and any(self.children[p].poll() is None for p in open_):
                        time.sleep(_POLL_SECONDS)
                    self._send(signal.SIGKILL)
                deadline = float("inf")
        for reader in self._readers:
            reader.join(_KILL_SECONDS)  # a process of theirs may hold the pipe open
        return failure

    def _report(self, process: int, code: int, open_: set[int]) -> None:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        log = "" if self._config.log_dir is None else f", see {self._config.log_dir / f'process-{process}.log'}"
        _say(f"process {process} (pid {self.children[process].pid}) {how}{log}")
        for other in sorted(open_):
            if self._is_stopped(other):
                pid = self.children[other].pid
                _say(f"process {other} (pid {pid}) is stopped (SIGSTOP or SIGTSTP): the others gave it up")

    def _is_stopped(self, process: int) -> bool:
        with suppress(ChildProcessError):
            flags = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.children[process].pid, flags) is not None
        return False

    def _send(self, signum: int) -> None:
        for child in self.children:
            if child.poll() is None:
                with suppress(ProcessLookupError):
                    # What a process started is its own to end, unless it is to be killed.
                    (os.killpg if signum == signal.SIGKILL else os.kill)(child.pid, signum)

    def _copy(self, process: int, lines: IO[str], log: IO[str] | None) -> None:
        for line in lines:
            line = line.removesuffix("\n") + "\n"
            if log is not None:
                log.write(line)
                log.flush()
            if log is None or process == 0:
                with self._output, suppress(BrokenPipeError):
                    sys.stdout.write(line if log is not None else f"[{process}] {line}")
                    sys.stdout.flush()
        if log is not None:
            log.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _say(line: str) -> None:
    print(f"launch.local: {line}", file=sys.stderr, flush=True)


def launch(options: list[str], command: list[str]) -> int:
    config = tyro.cli(Local, args=options, prog="python -m launch.local", description=__doc__)
    command = full_command(command, sys.executable, "python -m launch.local --processes 4")
    if config.dry_run:
        for process in range(config.processes):
            variables = [f"{name}={shlex.quote(value)}" for name, value in environment(config, process, 0).items()]
            print(" ".join(variables), shlex.join(command))
        print("# port 0 stands for a free one")
        return 0
    group = Group(config)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, group.on_signal)
    try:
        group.start(command)
    except OSError as error:
        raise LaunchError(f"cannot start {command[0]}: {error}") from error
    return group.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main("launch.local", launch, arguments)


if __name__ == "__main__":
    sys.exit(main())
