"""launch.slurm: the script, run by bash with an srun and scontrol that record their calls."""

import os
import re
import signal
import subprocess
import time

import pytest

from launch.slurm import main

OPTIONS = ["--time", "24:00:00", "--nodes", "2", "--gpus-per-node", "8", "--python", "python3"]
COMMAND = ["--", "-m", "experiments.pretrain", "--run_dir", "runs/my run"]


def dry(capsys, *options: str) -> str:
    assert main([*OPTIONS, *options, "--dry-run", *COMMAND]) == 0
    return capsys.readouterr().out


def test_script_asks_for_what_was_asked(capsys):
    text = dry(capsys, "--account", "lab", "--save-seconds", "120", "--setup", "module load cuda/12")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))
    assert options == {
        "job-name": "moe_jax",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "8",
        "time": "24:00:00",
        "account": "lab",
        "signal": "B:TERM@120",
        "output": "slurm/%j.out",
        "open-mode": "append",
    }
    assert "#SBATCH --requeue\n" in text and "\nmodule load cuda/12\n" in text
    assert "srun --kill-on-bad-exit=1 python3 -m experiments.pretrain --run_dir 'runs/my run' &" in text
    assert text.index("#SBATCH --requeue") < text.index("set -uo")  # SLURM reads no option after the first command


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Puts an srun that lasts until SIGTERM (or exits with $SRUN_CODE at once) and a scontrol on PATH."""
    srun = """#!/bin/bash
echo "srun $*" >>"$CALLS"
[ -n "${SRUN_CODE:-}" ] && exit "$SRUN_CODE"
trap 'sleep 0.2; echo saved >>"$CALLS"; exit 143' TERM
while :; do sleep 0.05; done
"""
    for name, text in {"srun": srun, "scontrol": '#!/bin/bash\necho "scontrol $*" >>"$CALLS"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return tmp_path


def play(capsys, folder, *options: str) -> tuple[int, list[str]]:
    """Runs the script, tells it to stop, and gives its exit code and the calls after srun's."""
    (folder / "script").write_text(dry(capsys, *options))
    child = subprocess.Popen(["bash", str(folder / "script")], stdout=subprocess.DEVNULL)
    for _ in range(200):
        if (folder / "calls").exists():
            break
        time.sleep(0.02)
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    code = child.wait(10)
    return code, (folder / "calls").read_text().splitlines()[1:]


def test_told_to_stop_it_saves_and_queues_itself_again(capsys, cluster):
    assert play(capsys, cluster) == (0, ["saved", "scontrol requeue 17"])


def test_requeues_are_bounded(capsys, cluster, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert play(capsys, cluster, "--max-requeues", "3") == (143, ["saved"])


@pytest.mark.parametrize("code", [0, 9])
def test_a_run_that_ends_is_not_queued_again(capsys, cluster, monkeypatch, code):
    monkeypatch.setenv("SRUN_CODE", str(code))
    done = subprocess.run(["bash"], input=dry(capsys), text=True)
    assert done.returncode == code
    assert len((cluster / "calls").read_text().splitlines()) == 1


def test_submit(tmp_path, monkeypatch, capsys):
    expected = dry(capsys)
    tool = tmp_path / "sbatch"
    tool.write_text(f"#!/bin/bash\n/bin/cat >{tmp_path}/script\nexit ${{SBATCH_CODE:-0}}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main([*OPTIONS, *COMMAND]) == 0
    assert expected.startswith((tmp_path / "script").read_text()) and (tmp_path / "slurm").is_dir()
    monkeypatch.setenv("SBATCH_CODE", "1")
    assert main([*OPTIONS, *COMMAND]) == 2
    assert "sbatch ended with exit code 1" in capsys.readouterr().err


def test_refusals(monkeypatch, capsys):
    def error(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "put it after --" in error(*OPTIONS, "--dry-run")
    assert "--time soon" in error("--time", "soon", *COMMAND)
    assert "--nodes 0" in error("--time", "10", "--nodes", "0", *COMMAND)
    assert "no spaces" in error("--time", "10", "--name", "a b", *COMMAND)
    monkeypatch.setenv("PATH", "")
    assert "sbatch is not installed" in error(*OPTIONS, *COMMAND)
