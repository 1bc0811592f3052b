"""A run on the GPUs of a SLURM cluster.

    python -m launch.slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 -- -m experiments.pretrain --run_dir runs/my-run

It writes a script and hands it to `sbatch`; --dry-run prints it. One process per GPU, which JAX finds out by SLURM's
variables. Before the time is up (and on pre-emption) the processes get SIGTERM, save and end, and the job queues again:
the command resumes from its checkpoint. A run that fails is not queued again. `run_dir` must lie on a disk that all
nodes see. No cluster was at hand to try; the script is checked by bash alone.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from launch.command import LaunchError, Shell, full_command, run_main


@dataclass(frozen=True)
class Slurm:
    time: str
    """Time limit of one go: minutes, HH:MM:SS or D-HH:MM:SS."""
    nodes: int = 1
    gpus_per_node: int = 1
    cpus_per_gpu: int = 8
    name: str = "moe_jax"
    partition: str = ""
    account: str = ""
    python: str = sys.executable
    """The interpreter on the nodes."""
    setup: str = ""
    """A line of shell before the run, e.g. 'module load cuda/12'."""
    save_seconds: int = 300
    """How long before the time limit the processes are told to save."""
    max_requeues: int = 100
    log_dir: Path = Path("slurm")
    """Where the output goes: <job>.out, appended to by every go."""
    dry_run: bool = False
    """Only print the script and the command."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise LaunchError(f"--time {self.time}: must be minutes, HH:MM:SS or D-HH:MM:SS")
        for field in ("nodes", "gpus_per_node", "cpus_per_gpu", "save_seconds"):
            if getattr(self, field) < 1:
                raise LaunchError(f"--{field.replace('_', '-')} {getattr(self, field)}: must be at least 1")
        for field in ("name", "partition", "account", "log_dir"):
            if re.search(r"[\s\"'$`]", str(getattr(self, field))):
                raise LaunchError(f"--{field.replace('_', '-')} {getattr(self, field)!r}: no spaces, quotes, $ or `")


def script(config: Slurm, command: Sequence[str]) -> str:
    """The sbatch script that runs the command on every GPU and queues itself again when it was told to stop."""
    options = {
        "job-name": config.name,
        "nodes": config.nodes,
        "ntasks-per-node": config.gpus_per_node,
        "gpus-per-node": config.gpus_per_node,
        "cpus-per-task": config.cpus_per_gpu,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        # To the batch shell alone: it passes the signal on to the processes and then queues the job again.
        "signal": f"B:TERM@{config.save_seconds}",
        "output": f"{config.log_dir}/%j.out",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value != ""]
    return f"""#!/bin/bash
{chr(10).join(lines)}
#SBATCH --requeue

set -uo pipefail
{config.setup or ":"}
export JAX_PLATFORMS=cuda,cpu PYTHONUNBUFFERED=1

told_to_stop=0
trap 'told_to_stop=1; kill -TERM "$step" 2>/dev/null' TERM
# srun passes SIGTERM on to every process. One that dies ends the others, within a bounded time.
srun --kill-on-bad-exit=1 {shlex.join(command)} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done

if [ "$told_to_stop" = 1 ] && [ "$code" != 0 ]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {config.max_requeues} ]; then
    echo "stopped by SLURM (exit code $code): queued again, and resumes"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  echo "queued again {config.max_requeues} times already (--max-requeues): run the same command to go on"
fi
exit "$code"
"""


def submit(options: list[str], command: list[str]) -> int:
    config = tyro.cli(Slurm, args=options, prog="python -m launch.slurm", description=__doc__)
    text = script(config, full_command(command, config.python, "python -m launch.slurm --time 24:00:00"))
    shell = Shell(config.dry_run)
    if config.dry_run:
        print(text, end="")
        print("# sbatch (this script on its standard input)")
        return 0
    shell.require_tool("sbatch", "run this on a login node of the cluster, or print the script with --dry-run")
    config.log_dir.mkdir(parents=True, exist_ok=True)  # SLURM drops the output if the folder is missing
    done = subprocess.run(["sbatch"], input=text, text=True)
    if done.returncode:
        raise LaunchError(f"sbatch ended with exit code {done.returncode}: it says above what it refuses")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main("launch.slurm", submit, arguments)


if __name__ == "__main__":
    sys.exit(main())
