"""A run on TPU slices of a GKE cluster, as a JobSet.

    python -m launch.jobset --name my-run --image IMAGE --accelerator tpu-v5p-slice --topology 2x2x4 \\
        --chips-per-host 4 -- -m experiments.pretrain --run_dir /data/my-run

It is handed to `kubectl apply`; --dry-run prints the manifest. One slice is one Job with one pod per host; if a pod
fails or its host is pre-empted, JobSet starts all again (up to --max-restarts times) and the command resumes from its
checkpoint, so `run_dir` must lie on a disk or bucket that all pods see (--volume-claim). GKE tells each pod of its
peers, which JAX reads. Clusters made by xpk have JobSet and Kueue installed and take the same manifest (--queue).

The label names of GKE's TPUs are as Google documents them; no cluster was at hand to try.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from launch.command import LaunchError, Shell, full_command, run_main

_EXAMPLE = "python -m launch.jobset --name my-run …"


@dataclass(frozen=True)
class JobSet:
    name: str
    """Lower-case letters, digits and '-', at most 28 characters."""
    image: str
    """A container image with this code and `pip install -e '.[tpu]'`."""
    accelerator: str
    """Value of the node label cloud.google.com/gke-tpu-accelerator: tpu-v5p-slice, tpu-v6e-slice, tpu7x, …"""
    topology: str
    """Of one slice in chips: 4x4, 2x2x4, …"""
    chips_per_host: int = 4
    slices: int = 1
    namespace: str = "default"
    queue: str = ""
    """A Kueue queue to wait in."""
    spot: bool = False
    """Run on spot nodes."""
    volume_claim: str = ""
    """A PersistentVolumeClaim that is mounted at /data in every pod."""
    max_restarts: int = 100
    dry_run: bool = False
    """Only print the manifest and the command."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,26}[a-z0-9])?", self.name):
            raise LaunchError(
                f"--name {self.name}: must be lower-case letters, digits and '-', begin with a letter, end with a"
                " letter or digit, and have at most 28 characters"
            )
        if not re.fullmatch(r"\d+(x\d+){1,2}", self.topology):
            raise LaunchError(f"--topology {self.topology}: must be the chips along each axis, as 4x4 or 2x2x4")
        for field in ("chips_per_host", "slices"):
            if getattr(self, field) < 1:
                raise LaunchError(f"--{field.replace('_', '-')} {getattr(self, field)}: must be at least 1")
        if self.max_restarts < 0:
            raise LaunchError(f"--max-restarts {self.max_restarts}: must be 0 or more")
        if self.chips % self.chips_per_host:
            raise LaunchError(
                f"--topology {self.topology}: its {self.chips} chips are no multiple of --chips-per-host"
                f" {self.chips_per_host}"
            )

    @property
    def chips(self) -> int:
        return math.prod(int(size) for size in self.topology.split("x"))


def manifest(config: JobSet, command: Sequence[str]) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2) that runs the command on every host of every slice."""
    hosts = config.chips // config.chips_per_host
    chips = {"google.com/tpu": config.chips_per_host}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": config.accelerator,
        "cloud.google.com/gke-tpu-topology": config.topology,
    }
    container: dict[str, Any] = {
        "name": "run",
        "image": config.image,
        "command": list(command),
        "env": [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "resources": {"requests": chips, "limits": chips},
        "securityContext": {"privileged": True},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": 120,  # to save when pre-empted
        "nodeSelector": selector,
        "containers": [container],
    }
    if config.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        pod["tolerations"] = [spot]
    if config.volume_claim:
        container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        pod["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": config.volume_claim}}]
    metadata: dict[str, Any] = {
        "name": config.name,
        "namespace": config.namespace,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    if config.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": config.queue}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,  # one pod that fails fails its slice, and JobSet starts all slices again
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": config.max_restarts},
            "replicatedJobs": [{"name": "slice", "replicas": config.slices, "template": {"spec": job}}],
        },
    }


def to_yaml(value: Any, indent: str = "") -> str:
    """Nested dictionaries and lists as YAML; scalars are written as JSON, which YAML contains."""
    lines = []
    if isinstance(value, dict):
        for key, item in value.items():
            nested = isinstance(item, dict | list) and item
            lines.append(
                f"{indent}{key}:" + (f"\n{to_yaml(item, indent + '  ')}" if nested else f" {json.dumps(item)}")
            )
    else:
        for item in value:
            nested = isinstance(item, dict | list) and item
            lines.append(f"{indent}- " + (to_yaml(item, indent + "  ").lstrip() if nested else json.dumps(item)))
    return "\n".join(lines)


def submit(options: list[str], command: list[str]) -> int:
    config = tyro.cli(JobSet, args=options, prog="python -m launch.jobset", description=__doc__)
    text = to_yaml(manifest(config, full_command(command, "python", _EXAMPLE)))
    shell = Shell(config.dry_run)
    apply = ["kubectl", "apply", "--namespace", config.namespace, "--filename", "-"]
    if config.dry_run:
        print(text)
        print(f"# {' '.join(apply)}")
        return 0
    shell.require_tool("kubectl", "install it (https://kubernetes.io/docs/tasks/tools), or print with --dry-run")
    if code := subprocess.run(apply, input=text + "\n", text=True).returncode:
        raise LaunchError(
            f"kubectl apply ended with exit code {code}: the cluster needs JobSet (kubectl apply --server-side -f"
            " https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml) and kubectl access to"
            " it (gcloud container clusters get-credentials)"
        )
    selector = f"jobset.sigs.k8s.io/jobset-name={config.name}"
    for hint in ("get pods", "logs --follow --prefix --max-log-requests 100"):
        print(f"kubectl {hint} --namespace {config.namespace} --selector {selector}")
    print(f"kubectl delete jobset {config.name} --namespace {config.namespace}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main("launch.jobset", submit, arguments)


if __name__ == "__main__":
    sys.exit(main())
