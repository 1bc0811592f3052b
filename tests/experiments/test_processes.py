"""One run by several processes: the same losses as by one, one log, and any number of them resumes it.

The processes are real ones (`launch.local`), that talk over the loopback.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

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


def start(processes, arguments, log, devices=4):
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment.pop("XLA_FLAGS", None)
    launcher = ["-m", "launch.local", "--processes", str(processes), "--devices", str(devices // processes), "--"]
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
        )


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


def test_any_number_of_processes_goes_on_with_a_run(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n}: " + "lorem ipsum " * (n % 7)}) + "\n" for n in range(200)))
    arguments = [*PRETRAIN, "--data.path", str(text), "--run-dir"]
    log = tmp_path / "log"

    finish(start(1, [*arguments, str(tmp_path / "alone")], log), log)
    expected = rows(tmp_path / "alone")

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

    found = rows(folder)
    assert [(row["phase"], row["step"]) for row in found] == [(row["phase"], row["step"]) for row in expected]
    for one, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-4)
    for name in ("moe/expert_load", "moe/bias_norm"):
        np.testing.assert_allclose(found[-2][name], expected[-2][name], rtol=0.05, err_msg=name)


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
