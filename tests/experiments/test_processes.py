"""One run by several processes: the same losses as by one, one log, and any number of them resumes it.

The processes are real ones (`launch.local`), that talk over the loopback.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
SMALL = [
    *("--model.num-layers", "2", "--model.hidden-size", "32", "--model.mtp.depth", "0"),
    *("--model.attention.kind", "gqa", "--model.attention.num-kv-heads", "4", "--model.attention.head-dim", "8"),
    *("--model.moe.num-experts", "4", "--model.moe.expert-size", "16", "--model.intermediate-size", "64"),
    *("--mesh.data", "-1", "--mesh.expert", "2", "--checkpoint.every", "4"),
]
PRETRAIN = [
    *("experiments.pretrain", *SMALL, "--train.steps", str(STEPS), "--validation-every", "1000"),
    *("--train.batch-size", "4", "--train.sequence-length", "32"),
]
GRPO = [
    *("experiments.grpo_math", *SMALL, "--no-controls", "--rl.reward.random", "--rl.loss.beta", "0.1"),
    *("--pretrain.steps", "2", "--pretrain.batch-size", "4", "--rl.steps", "3", "--rl.num-prompts", "4"),
    *("--rl.group-size", "2", "--rl.sampling.max-new-tokens", "8", "--rl.reward.format-weight", "0"),
    *("--data.test-problems", "8", "--evaluation.batch-size", "8", "--evaluation.samples", "2"),
]


HANGING = """
import os, runpy, sys, time
from moe_jax.data.text import TrainBatches

taken, whole = 0, TrainBatches.__next__

def hang(batches):
    global taken
    taken += 1
    if taken == 11 and os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(10**6)
    return whole(batches)

TrainBatches.__next__ = hang
runpy.run_module("experiments.pretrain", run_name="__main__", alter_sys=True)
"""
"""`experiments.pretrain`, whose process 1 never gets its 11th batch."""


def start(processes, arguments, log, devices=4, options=(), module=True):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    environment.pop("XLA_FLAGS", None)
    launcher = ["-m", "launch.local", "--processes", str(processes), "--devices", str(devices // processes)]
    command = [sys.executable, *launcher, *options, "--", *(["-m"] if module else []), *arguments]
    with open(log, "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def finish(process, log, code=0):
    assert process.wait(timeout=600) == code, log.read_text()[-4000:]


def rows(folder):
    with open(folder / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def stop_after_a_step(process, folder, more_than):
    """SIGTERM to the launcher, once another step is logged; it passes the signal on."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(rows(folder)) > more_than:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n}: " + "lorem ipsum " * (n % 7)}) + "\n" for n in range(200)))
    return str(file)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, text):
    """The lines of metrics of an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    log = folder / "log"
    finish(start(1, [*PRETRAIN, "--data.path", text, "--run-dir", str(folder / "run")], log), log)
    return rows(folder / "run")


def agree(found, expected):
    assert [(row["phase"], row["step"]) for row in found] == [(row["phase"], row["step"]) for row in expected]
    for one, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-4)
    for name in ("moe/expert_load", "moe/bias_norm"):
        np.testing.assert_allclose(found[-2][name], expected[-2][name], rtol=0.05, err_msg=name)


def test_any_number_of_processes_goes_on_with_a_run(tmp_path, text, expected):
    arguments = [*PRETRAIN, "--data.path", text, "--run-dir"]
    log = tmp_path / "log"
    folder, done = tmp_path / "several", 0
    for processes in (4, 1):
        process = start(processes, [*arguments, str(folder)], log)
        stop_after_a_step(process, folder, done)
        finish(process, log, code=143)
        assert log.read_text().count("stopped, saved at pretrain") == processes  # all at the same step
        assert done < len(rows(folder)) < STEPS
        done = len(rows(folder))
    finish(start(2, [*arguments, str(folder)], log), log)
    assert log.read_text().count("bits per byte on held-out text") == 1  # one process reports

    agree(rows(folder), expected)


def test_a_run_whose_process_hangs_ends_with_its_name_and_resumes(tmp_path, text, expected):
    script, log, folder = tmp_path / "hanging.py", tmp_path / "log", tmp_path / "run"
    script.write_text(HANGING)
    arguments = [*PRETRAIN[1:], "--data.path", text, "--run-dir", str(folder)]
    # Longer than the first step takes to compile.
    process = start(2, [str(script), *arguments], log, options=["--hang-seconds", "60"], module=False)
    finish(process, log, code=1)
    said = log.read_text()
    behind = r"process 1 \(.*\) is behind: since [\d:]+ at pretrain, step 11\n"
    assert re.search(rf"\[0\] {behind}(\[0\]   File .*\n)*\[0\]   File .*hanging.py.*, in hang\n", said), said[-4000:]
    assert not re.search(r"process 0 \(.*\) is behind", said)
    assert 8 <= len(rows(folder)) <= 10  # saved is step 8
    finish(start(2, [PRETRAIN[0], *arguments], log), log)
    agree(rows(folder), expected)


def test_grpo_by_two_processes(tmp_path):
    log = tmp_path / "log"
    for processes in (1, 2):
        finish(start(processes, [*GRPO, "--run-dir", str(tmp_path / str(processes))], log), log)
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert len(one) == len(two)
    updates = [row for row in one if row["phase"] == "grpo" and not row["update_skipped"]]
    assert updates and all(row["grad_norm"] > 0 for row in updates)
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "reward", "num_tokens", "grad_norm", "kl", "entropy"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), (a["phase"], a["step"], name)
