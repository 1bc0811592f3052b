"""Checks a machine before a run, and names the remedy for what it finds.

    python -m launch.doctor --platform tpu --run-dir runs/my-run

Under several processes (`launch.local`, SLURM, a TPU slice) run it in each, as the run itself would be; every process
reports. The exit code is 1 if a check failed; warnings leave it 0.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from launch.command import run_main

_GIB = 2**30


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "warning", "failed"]
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Doctor:
    platform: Literal["tpu", "gpu", "cpu"] = "cpu"
    """Where the run shall compute."""
    run_dir: Path = Path("runs")
    """Where it shall write."""
    hosts: int = 0
    """How many processes there should be; 0: as many as the environment says."""
    disk_gib: float = 10.0
    """Free space that the run needs."""
    memory_gib: float = 2.0
    """Host memory that the run needs."""
    start_seconds: int = 60
    """How long to wait for the other processes."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Prints one JSON object and nothing else."""


def check_versions(platform: str) -> Check:
    """Python, jax, jaxlib and the platform's plugin: there, and made for each other."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    plugin = {"tpu": r"libtpu", "gpu": r"jax-cuda\d+-plugin", "cpu": r"$^"}[platform]
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name in ("jax", "jaxlib") or re.fullmatch(plugin, name):
            found[name] = distribution.version
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    extra = {"tpu": "[tpu]", "gpu": "[gpu]", "cpu": ""}[platform]
    remedy = f"pip install --upgrade -e '.{extra}' in a fresh virtual environment"
    jax = found.get("jax")
    # jax asks for its own release of jaxlib and of the CUDA plugin, up to the last number.
    others = [version for name, version in found.items() if name == "jaxlib" or "cuda" in name]
    if jax is None or "jaxlib" not in found or any(v.split(".")[:2] != jax.split(".")[:2] for v in others):
        return Check("versions", "failed", f"{text}: they do not fit", remedy)
    if platform != "cpu" and not any(re.fullmatch(plugin, name) for name in found):
        return Check("versions", "failed", f"{text}: no plugin for {platform}", remedy)
    if platform == "tpu" and (wanted := _required("libtpu")) and not found["libtpu"].startswith(wanted):
        return Check("versions", "failed", f"{text}: jax {jax} asks for libtpu {wanted}", remedy)
    return Check("versions", "ok", text)


def _required(package: str) -> str:
    """The version of a package that jax pins, as "0.0.42"; empty if it pins none."""
    for requirement in importlib.metadata.requires("jax") or []:
        if match := re.match(rf"{package}\s*==\s*([\d.]+?)(\.\*)?\s*(;|$)", requirement):
            return match.group(1)
    return ""


def check_platform(asked: str, found: str, kinds: Sequence[str], variable: str) -> Check:
    """The platform asked for is the one that JAX found: it falls back to the CPU without an error."""
    text = f"{found}: {len(kinds)} devices ({', '.join(sorted(set(kinds)))})"
    if found == asked:
        return Check("platform", "ok", text)
    name = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}[asked]
    remedy = f"set JAX_PLATFORMS={name}, which makes JAX say why it does not get the {asked.upper()}"
    if variable:
        remedy += f" (now JAX_PLATFORMS={variable})"
    return Check("platform", "failed", f"{text} instead of {asked}", remedy)


def check_tpu_free(lock: Path = Path("/tmp/libtpu_lockfile"), proc: Path = Path("/proc")) -> Check:
    """Nobody else holds the chips: libtpu's lock file and the device files."""
    owners = []
    for process in proc.glob("[0-9]*"):
        try:
            targets = {os.readlink(file) for file in (process / "fd").iterdir()}
        except OSError:
            continue  # ended meanwhile, or another user's
        own = process.name == str(os.getpid())
        if not own and any(re.match(rf"/dev/accel\d|/dev/vfio/\d|{re.escape(str(lock))}$", file) for file in targets):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            owners.append(f"pid {process.name} ({command[:80]})")
    if owners:
        return Check("devices free", "failed", f"in use by {', '.join(owners)}", "wait for it, or end it with kill PID")
    if lock.exists():
        found = f"{lock} is there, but no process of yours holds it"
        return Check("devices free", "warning", found, f"if no other user runs on this host: sudo rm {lock}")
    return Check("devices free", "ok", "no process holds the chips")


def check_gpu_free() -> Check:
    """Little of the GPUs' memory is in use."""
    query = ["nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("devices free", "failed", f"nvidia-smi: {error}", "install the NVIDIA driver")
    if done.returncode:
        return Check("devices free", "failed", done.stderr.strip() or done.stdout.strip(), "reload the NVIDIA driver")
    gpus = [[int(number) for number in line.split(",")] for line in done.stdout.splitlines()]
    busy = [f"GPU {index}: {used} of {total} MiB" for index, used, total in gpus if used > 0.1 * total]
    if busy:
        return Check("devices free", "failed", "; ".join(busy), "nvidia-smi names the processes; wait or end them")
    return Check("devices free", "ok", f"{len(gpus)} GPUs, at most 10 % of their memory in use")


def check_hosts(expected: int, seen: Sequence[str]) -> Check:
    text = f"{len(seen)} processes: {'; '.join(seen)}"
    if expected in (0, len(seen)):
        return Check("hosts", "ok", text)
    remedy = "start the command on every host (gcloud … ssh --worker=all, srun, launch.local)"
    return Check("hosts", "failed", f"{text}; expected {expected}", remedy)


def check_disk(folder: Path, gib: float) -> Check:
    if re.match(r"\w+:/", str(folder)):
        return Check("run folder", "failed", f"{folder} is no folder", "mount the bucket as one (gcsfuse, s3fs)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
        free = shutil.disk_usage(folder).free / _GIB
    except OSError as error:
        return Check("run folder", "failed", f"cannot write {folder}: {error}", "choose another with --run-dir")
    text = f"{folder}: {free:.1f} GiB free"
    if free < gib:
        return Check("run folder", "failed", text, f"make room ({gib:g} GiB), or choose another with --run-dir")
    return Check("run folder", "ok", text)


def check_memory(gib: float, meminfo: Path = Path("/proc/meminfo")) -> Check:
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    except OSError:
        match = None
    if match is None:
        return Check("host memory", "warning", "this system does not say", f"see that {gib:g} GiB are free")
    free = int(match.group(1)) * 1024 / _GIB
    remedy = "" if free >= gib else "end other programs, or take a host with more memory"
    return Check("host memory", "ok" if free >= gib else "failed", f"{free:.1f} GiB available", remedy)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Data workers and NCCL use it; containers often get 64 MiB."""
    if not folder.is_dir():
        return Check("shared memory", "ok", f"no {folder} on this system")
    free = shutil.disk_usage(folder).free / _GIB
    if free < 1:
        remedy = "docker run --shm-size=8g, or on Kubernetes an emptyDir of medium Memory at /dev/shm"
        return Check("shared memory", "warning", f"{folder}: {free:.2f} GiB free", remedy)
    return Check("shared memory", "ok", f"{folder}: {free:.1f} GiB free")


def check_open_files(limits: tuple[int, int] | None = None) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE) if limits is None else limits
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return Check("open files", "failed", f"limit {soft}", f"ulimit -n {max(hard, 4096)}")
    return Check("open files", "ok", f"limit {'none' if soft == resource.RLIM_INFINITY else soft}")


def examine(config: Doctor) -> list[Check]:
    """All checks, those of devices last: they start JAX."""
    checks = [
        check_versions(config.platform),
        check_disk(config.run_dir, config.disk_gib),
        check_memory(config.memory_gib),
        check_shared_memory(),
        check_open_files(),
    ]
    if config.platform != "cpu":
        checks.append(check_tpu_free() if config.platform == "tpu" else check_gpu_free())
    return checks + _check_devices(config)


def _check_devices(config: Doctor) -> list[Check]:
    from moe_jax.config import ConfigError

    try:
        import jax

        from moe_jax.training import distributed

        names = distributed.initialize(start_seconds=config.start_seconds)
    except ImportError as error:
        return [Check("platform", "failed", str(error), "pip install -e . in a fresh virtual environment")]
    except (ConfigError, distributed.DistributedError) as error:
        return [Check("hosts", "failed", str(error), "the message says")]
    hosts = check_hosts(config.hosts, names or [f"{socket.gethostname()}, pid {os.getpid()}"])
    try:
        devices: list[Any] = jax.devices()
    except RuntimeError as error:
        remedy = f"see `devices free` and `versions`; `--platform` asks for {config.platform}"
        return [hosts, Check("platform", "failed", str(error), remedy)]
    kinds = [device.device_kind for device in devices]
    return [hosts, check_platform(config.platform, jax.default_backend(), kinds, os.environ.get("JAX_PLATFORMS", ""))]


def report(options: list[str], command: list[str]) -> int:
    config = tyro.cli(Doctor, args=[*options, *command], prog="python -m launch.doctor", description=__doc__)
    checks = examine(config)
    healthy = all(check.status != "failed" for check in checks)
    if config.as_json:
        print(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            print(f"{check.status:8}{check.name:15}{check.found}" + (f"\n{'':23}→ {check.remedy}" * bool(check.remedy)))
    return 0 if healthy else 1


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main("launch.doctor", report, arguments)


if __name__ == "__main__":
    sys.exit(main())
