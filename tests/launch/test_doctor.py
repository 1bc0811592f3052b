"""launch.doctor: each check in health and in each illness that it knows."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import doctor

ROOT = Path(__file__).resolve().parents[2]


def install(monkeypatch, **versions: str) -> None:
    """Makes these, and no others, the installed packages."""

    class Distribution:
        def __init__(self, name: str, version: str):
            self.metadata, self.version = {"Name": name}, version

    packages = [Distribution(name.replace("_", "-"), version) for name, version in versions.items()]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: packages)


def test_versions(monkeypatch):
    monkeypatch.setattr(doctor, "_required", lambda package: "0.0.42")
    install(monkeypatch, jax="0.10.2", jaxlib="0.10.2")
    assert doctor.check_versions("cpu").status == "ok"
    missing = doctor.check_versions("tpu")
    assert (missing.status, "'.[tpu]'" in missing.remedy) == ("failed", True)
    assert doctor.check_versions("gpu").status == "failed"
    install(monkeypatch, jax="0.10.2", jaxlib="0.9.0")
    assert "do not fit" in doctor.check_versions("cpu").found
    install(monkeypatch, jax="0.10.2", jaxlib="0.10.2", libtpu="0.0.42.1", jax_cuda12_plugin="0.10.2")
    assert doctor.check_versions("tpu").status == doctor.check_versions("gpu").status == "ok"
    install(monkeypatch, jax="0.10.2", jaxlib="0.10.2", libtpu="0.0.17", jax_cuda12_plugin="0.9.0")
    assert "asks for libtpu 0.0.42" in doctor.check_versions("tpu").found
    assert doctor.check_versions("gpu").status == "failed"


def test_a_fall_back_to_the_cpu_is_a_failure():
    assert doctor.check_platform("tpu", "tpu", ["TPU v5p"] * 4, "").status == "ok"
    check = doctor.check_platform("tpu", "cpu", ["cpu"], "")
    assert check.status == "failed" and "instead of tpu" in check.found and "JAX_PLATFORMS=tpu" in check.remedy
    assert "JAX_PLATFORMS=cuda" in doctor.check_platform("gpu", "cpu", ["cpu"], "cpu").remedy


def test_tpu_held_stale_lock_and_free(tmp_path):
    lock, proc = tmp_path / "lock", tmp_path / "proc"
    proc.mkdir()
    assert doctor.check_tpu_free(lock, proc).status == "ok"
    lock.touch()
    stale = doctor.check_tpu_free(lock, proc)
    assert stale.status == "warning" and f"rm {lock}" in stale.remedy
    (proc / "4242" / "fd").mkdir(parents=True)
    (proc / "4242" / "cmdline").write_bytes(b"python\0train.py")
    (proc / "4242" / "fd" / "7").symlink_to("/dev/vfio/0")
    held = doctor.check_tpu_free(lock, proc)
    assert held.status == "failed" and "pid 4242 (python train.py)" in held.found
    (proc / "4242" / "fd" / "7").unlink()
    (proc / "4242" / "fd" / "8").symlink_to(lock)
    assert "pid 4242" in doctor.check_tpu_free(lock, proc).found


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("echo '0, 10, 80000'; echo '1, 20, 80000'", "ok"),
        ("echo '0, 10, 80000'; echo '1, 70000, 80000'", "failed"),
        ("echo 'driver mismatch' >&2; exit 18", "failed"),
    ],
)
def test_gpu_memory(tmp_path, monkeypatch, script, status):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.check_gpu_free()
    assert check.status == status
    if "70000" in script:
        assert check.found == "GPU 1: 70000 of 80000 MiB"


def test_no_driver(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert doctor.check_gpu_free().status == "failed"


def test_hosts():
    assert doctor.check_hosts(0, ["a"]).status == doctor.check_hosts(2, ["a", "b"]).status == "ok"
    check = doctor.check_hosts(4, ["a", "b"])
    assert check.status == "failed" and "2 processes: a; b; expected 4" in check.found and "srun" in check.remedy


def test_disk_memory_and_limits(tmp_path):
    assert doctor.check_disk(tmp_path / "new", 0).status == "ok"
    assert "make room" in doctor.check_disk(tmp_path, 1e9).remedy
    (tmp_path / "file").touch()
    assert "cannot write" in doctor.check_disk(tmp_path / "file" / "run", 0).found
    assert "mount the bucket" in doctor.check_disk(Path("gs://bucket/run"), 0).remedy
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    4194304 kB\n")
    assert doctor.check_memory(3.9, meminfo).status == "ok"
    assert doctor.check_memory(4.1, meminfo).status == "failed"
    assert doctor.check_memory(1, tmp_path / "none").status == "warning"
    assert doctor.check_open_files((256, 4096)).remedy == "ulimit -n 4096"
    assert doctor.check_open_files((4096, 4096)).status == "ok"


def run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.doctor", "--run-dir", str(tmp_path), "--disk-gib", "0", *options]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def test_command_line(tmp_path):
    done = run(tmp_path, "--json", "--memory-gib", "0")
    result = json.loads(done.stdout)
    assert (done.returncode, result["ok"]) == (0, True), done.stdout + done.stderr
    assert {check["name"] for check in result["checks"]} >= {"versions", "platform", "hosts", "run folder"}
    done = run(tmp_path, "--platform", "gpu", "--hosts", "2", "--memory-gib", "0")
    assert done.returncode == 1
    assert "instead of gpu" in done.stdout and "expected 2" in done.stdout and "→" in done.stdout
