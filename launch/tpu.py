"""A run on Cloud TPU slices, by queued resources.

    python -m launch.tpu run --name my-run --accelerator-type v6e-16 --zone us-east5-b --spot \\
        --prepare 'mountpoint -q /mnt/runs || sudo mount -o X-mount.mkdir SERVER:/share /mnt/runs' \\
        -- -m experiments.pretrain --run_dir /mnt/runs/my-run

`run` creates the slice if there is none, waits for it, copies this code, installs it, starts the command on every host
and shows the output of the first. The command goes on if this program ends: `logs` shows it again, `stop` lets it save.
A slice that was pre-empted (SUSPENDED never comes back) is deleted and created anew, and the command resumes from its
checkpoint, so `run_dir` must lie on a disk that all hosts share and that outlives them: Filestore, or a bucket mounted
with gcsfuse; --prepare mounts it. `delete` ends the costs: nothing else does.

Every action takes --dry-run. The flags of gcloud are those of its release 528; no slice was at hand to try.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import tyro

from launch.command import LaunchError, Shell, full_command, repository, require, run_main

STATES = {
    "CREATING": "the request has been received",
    "ACCEPTED": "the request is valid and in the queue",
    "WAITING_FOR_RESOURCES": "in the queue until enough chips are free",
    "PROVISIONING": "its turn: the hosts are being created",
    "ACTIVE": "ready",
    "SUSPENDING": "pre-empted or stopped: the hosts are being deleted",
    "SUSPENDED": "pre-empted or stopped: the hosts are gone, and the request never comes back but still uses quota",
    "FAILED": "cannot be fulfilled: see `gcloud … describe` for the reason",
    "DELETING": "being deleted",
}
"""Of a queued resource, as Google's reference explains them."""

_GONE = ("SUSPENDING", "SUSPENDED", "FAILED")
_RUNTIME = {"v4": "tpu-ubuntu2204-base", "v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5"}
_RUNTIME |= {"v6e": "v2-alpha-tpuv6e"}
_MAX_POLL_SECONDS = 120.0
_SSH_BROKE = 255
_BROKEN_IN_A_ROW = 10
_TRAVELS = ("pyproject.toml", "README.md", "moe_jax", "experiments", "launch")
_FOLDER = "$HOME/moe_jax_run"
"""On every host: log, pid, and exit (the exit code, once there is one)."""


@dataclass(frozen=True)
class Slice:
    action: tyro.conf.Positional[Literal["create", "setup", "run", "status", "logs", "stop", "delete"]]
    """create: the slice, ready to run; setup: copy and install the code again; run: all of it, and the command after
    --; status; logs: the first host's output; stop: let the command save and end; delete."""
    name: str
    """Of the queued resource and of its node (several: name-0, name-1, …)."""
    zone: str = ""
    """By default what `gcloud config` says."""
    project: str = ""
    """By default what `gcloud config` says."""
    accelerator_type: str = ""
    """v4-8, v5litepod-16, v5p-8, v6e-16, …: only to create."""
    runtime_version: str = ""
    """By default the one for the accelerator type."""
    slices: int = 1
    """More than one makes a multislice run."""
    spot: bool = False
    """Cheaper, may be pre-empted."""
    reserved: bool = False
    """From a reservation."""
    prepare: str = ""
    """A line of shell on every host before the command, e.g. to mount the disk that `run_dir` lies on."""
    poll_seconds: float = 10.0
    """How soon to look again at first; then less and less often, down to every two minutes."""
    wait_hours: float = 24.0
    """How long to wait in the queue."""
    retries: int = 100
    """How often a slice that was pre-empted is created anew."""
    dry_run: bool = False
    """Only print the commands."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", self.name):
            raise LaunchError(
                f"--name {self.name}: must be lower-case letters, digits and '-', beginning with a letter"
            )
        if self.slices < 1:
            raise LaunchError(f"--slices {self.slices}: must be at least 1")
        if self.spot and self.reserved:
            raise LaunchError("--spot and --reserved: choose one")
        if self.poll_seconds <= 0:
            raise LaunchError(f"--poll-seconds {self.poll_seconds:g}: must be above 0")


class QueuedResource:
    """One queued resource and what can be done with it."""

    def __init__(self, cfg: Slice):
        self.cfg = cfg
        self.shell = Shell(cfg.dry_run)
        self.shell.require_tool("gcloud", "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)")
        self.zone, self.project = self._setting("zone", "compute/zone"), self._setting("project", "core/project")
        self.nodes = [cfg.name] if cfg.slices == 1 else [f"{cfg.name}-{n}" for n in range(cfg.slices)]

    def state(self) -> str | None:
        """One of STATES, None if there is no such resource (so in a dry run)."""
        command = self._gcloud("queued-resources", "describe", self.cfg.name, "--format=value(state.state)")
        if self.cfg.dry_run:
            self.shell.run(command)
            return None
        code, state, error = self.shell.output(command)
        if code == 0:
            return state
        if "NOT_FOUND" in error:
            return None
        raise LaunchError(f"`{shlex.join(command)}` ended with exit code {code}: {error}")

    def ensure(self) -> None:
        """Creates what is missing or gone, and waits until it is ready."""
        state = self.state()
        if state in _GONE:
            _say(f"{self.cfg.name} is {state} ({STATES[state]}): deleting it to create it anew")
            self.delete()
            state = None
        if state is None:
            self.shell.check(self._create(), "see its message above; quota and zones: gcloud … accelerator-types list")
        self._wait()

    def delete(self) -> None:
        command = self._gcloud("queued-resources", "delete", self.cfg.name, "--force", "--quiet")
        self.shell.check(command, "try again in a minute")

    def set_up(self) -> None:
        """Copies the packages to every host, and nothing else, and installs them in an environment of its own."""
        with tempfile.TemporaryDirectory() as folder:
            archive = "moe_jax.tar.gz" if self.cfg.dry_run else f"{folder}/moe_jax.tar.gz"
            where = [f"--file={archive}", f"--directory={repository()}"]
            tar = ["tar", "--create", "--gzip", *where, "--exclude=__pycache__", *_TRAVELS]
            self.shell.check(tar, "is the disk full?")
            for node in self.nodes:
                copy = self._gcloud("tpu-vm", "scp", archive, f"{node}:moe_jax.tar.gz", "--worker=all")
                self.shell.check(copy, "is SSH to the hosts allowed (firewall, keys)?")
        # The hosts' Python may be older than what this project needs; uv brings its own.
        install = (
            "mkdir -p moe_jax && tar xzf moe_jax.tar.gz -C moe_jax && cd moe_jax && python3 -m pip install --quiet uv"
            " && python3 -m uv venv --quiet --allow-existing --python 3.11"
            " && python3 -m uv pip install --quiet --editable '.[tpu]'"
        )
        for node in self.nodes:
            self.shell.check(self._ssh(node, install), "see its message above; run `setup` again")

    def start(self, command: Sequence[str]) -> None:
        """Starts the command on every host, detached from the connection, unless one runs there already."""
        # On SIGTERM to the group the shell waits for the command, which saves, and notes its exit code.
        body = f"trap : TERM; {shlex.join(command)}; echo $? >{_FOLDER}/exit"
        prepare = f"{{ {self.cfg.prepare}; }} || exit 1; " if self.cfg.prepare else ""
        script = (
            f"mkdir -p {_FOLDER} && cd moe_jax || exit 1;"
            f" if kill -0 $(cat {_FOLDER}/pid 2>/dev/null) 2>/dev/null; then echo 'a command still runs'; exit 0; fi;"
            f" {prepare}rm -f {_FOLDER}/exit; PYTHONUNBUFFERED=1 JAX_PLATFORMS=tpu,cpu"
            f" setsid nohup bash -c {shlex.quote(body)} >{_FOLDER}/log 2>&1 </dev/null & echo $! >{_FOLDER}/pid"
        )
        for node in self.nodes:
            self.shell.check(self._ssh(node, script), "is the slice set up? `setup` does it")

    def follow(self) -> int:
        """Shows the output of the first host until the command ends; its exit code."""
        script = (
            f"tail -n +1 -F --pid=$(cat {_FOLDER}/pid) {_FOLDER}/log; exit $(cat {_FOLDER}/exit 2>/dev/null || echo 1)"
        )
        return self.shell.run(self._ssh(self.nodes[0], script, worker="0"))

    def stop(self) -> None:
        for node in self.nodes:
            self.shell.check(self._ssh(node, f"kill -TERM -- -$(cat {_FOLDER}/pid)"), "does the command still run?")

    def _wait(self) -> None:
        pause, seen, deadline = self.cfg.poll_seconds, None, time.monotonic() + 3600 * self.cfg.wait_hours
        while True:
            state = self.state()
            if self.cfg.dry_run:
                print(f"# … again every {pause:g} to {_MAX_POLL_SECONDS:g} s, until it says ACTIVE")
                return
            if state != seen:
                _say(f"{self.cfg.name}: {state}: {STATES.get(state or '', 'not there (yet)')}")
                seen = state
            if state == "ACTIVE":
                return
            if state in _GONE:
                raise LaunchError(f"{self.cfg.name} is {state}: {STATES[state]}. Delete it, or run the command again")
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{self.cfg.name} is still {state} after --wait-hours {self.cfg.wait_hours:g}; it stays in the"
                    " queue: run the command again to wait on, or delete it"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, _MAX_POLL_SECONDS)

    def _create(self) -> list[str]:
        cfg = self.cfg
        kind = require(cfg.accelerator_type, "--accelerator-type", "say which slice to create, e.g. v6e-16")
        version = cfg.runtime_version or _RUNTIME.get(kind.partition("-")[0])
        version = require(version, "--runtime-version", f"none is known for {kind} (tpu7x needs GKE: launch.jobset)")
        one = [f"--node-id={cfg.name}"]
        nodes = one if cfg.slices == 1 else [f"--node-count={cfg.slices}", f"--node-prefix={cfg.name}"]
        tier = ["--spot"] * cfg.spot + ["--reserved"] * cfg.reserved
        options = [f"--accelerator-type={kind}", f"--runtime-version={version}", *nodes, *tier]
        return self._gcloud("queued-resources", "create", cfg.name, *options)

    def _ssh(self, node: str, script: str, worker: str = "all") -> list[str]:
        return self._gcloud("tpu-vm", "ssh", node, f"--worker={worker}", f"--command={script}")

    def _gcloud(self, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", *words, f"--zone={self.zone}", f"--project={self.project}"]

    def _setting(self, flag: str, name: str) -> str:
        value = getattr(self.cfg, flag)
        if not value:
            with suppress(FileNotFoundError):  # in a dry run gcloud may be missing
                value = self.shell.output(["gcloud", "config", "get-value", name, "--quiet"])[1]
        unset = "" if value == "(unset)" else value
        return require(unset, f"--{flag}", f"give it, or set it once: gcloud config set {name} VALUE")


def _run(resource: QueuedResource, command: Sequence[str]) -> int:
    broken = 0
    resource.ensure()
    resource.set_up()
    resource.start(command)
    for left in range(resource.cfg.retries, -1, -1):
        while True:
            code = resource.follow()
            if code == 0 or resource.cfg.dry_run:
                return 0
            state = resource.state()
            if state is None or state == "DELETING":
                raise LaunchError(f"{resource.cfg.name} was deleted while the command ran")
            if state in _GONE:
                break
            if code != _SSH_BROKE or broken == _BROKEN_IN_A_ROW:
                _say(f"the command ended with exit code {code}; the slice is {state} and costs until `delete`")
                return code
            broken += 1
            _say(f"the connection broke, the slice is {state}: connecting again")
            time.sleep(resource.cfg.poll_seconds)
        if not left:
            raise LaunchError(f"{resource.cfg.name} is {state} again, after --retries {resource.cfg.retries}")
        _say(f"{resource.cfg.name} was pre-empted ({state}): creating it anew; the command resumes")
        broken = 0
        resource.ensure()
        resource.set_up()
        resource.start(command)
    raise AssertionError("unreachable")


def _say(line: str) -> None:
    print(f"launch.tpu: {line}", file=sys.stderr, flush=True)


def dispatch(options: list[str], command: list[str]) -> int:
    cfg = tyro.cli(Slice, args=options, prog="python -m launch.tpu", description=__doc__)
    words = (
        full_command(command, ".venv/bin/python", "python -m launch.tpu run --name r") if cfg.action == "run" else []
    )
    resource = QueuedResource(cfg)
    match cfg.action:
        case "create":
            resource.ensure()
            resource.set_up()
        case "setup":
            resource.set_up()
        case "run":
            return _run(resource, words)
        case "status":
            state = resource.state()
            if not cfg.dry_run:
                print(f"{cfg.name}: {state}: {STATES.get(state, '')}" if state else f"{cfg.name}: not there")
                return 0 if state else 1
        case "logs":
            return resource.follow()
        case "stop":
            resource.stop()
        case "delete":
            resource.delete()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main("launch.tpu", dispatch, arguments)


if __name__ == "__main__":
    sys.exit(main())
