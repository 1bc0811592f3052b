"""launch.local: output, signals, exit codes; and what the others say when one process of a run dies or hangs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import Local, environment, main

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import os, re, sys, time
import jax
from moe_jax.training import distributed
from moe_jax.training.watchdog import mark

names = distributed.initialize(start_seconds=60, shutdown_seconds=20)
with distributed.ending_together():
    import jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    assert len(jax.devices()) == 2 * len(jax.local_devices()) * int(os.environ["JAX_NUM_PROCESSES"]) // 2
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    local = np.full(len(jax.local_devices()), 1.0 + jax.process_index())
    x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("x")), local)
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
    print("pid", jax.process_index(), os.getpid(), "sum", float(total(x)), flush=True)
    mode = sys.argv[1]
    if mode == "barrier":
        distributed.barrier("together", 30)
        try:
            if jax.process_index() == 2:
                time.sleep(3)
            distributed.barrier("late", 1)
        except distributed.DistributedError as error:
            print("error:", error, flush=True)
    elif mode == "raise":
        if jax.process_index() == 1:
            raise ValueError("bad luck")
    step, hanging = 0, int(os.environ["JAX_PROCESS_ID"]) == int(sys.argv[2]) if sys.argv[2:] else False
    while mode in ("loop", "raise", "sleep", "native"):
        step += 1
        mark(f"loop, step {step}")
        if hanging and step == 20:
            time.sleep(1)  # so that step 20 is known to the others
            # Or one call of C code that keeps the interpreter.
            time.sleep(10**6) if mode == "sleep" else re.match("(a+)+b", "a" * 60)
        mark()
        float(total(x))
        time.sleep(0.01)
"""


def start(tmp_path: Path, options: list[str], script: str, *arguments: str) -> subprocess.Popen[str]:
    file = tmp_path / "worker.py"
    file.write_text(script)
    command = [sys.executable, "-m", "launch.local", *options, "--", str(file), *arguments]
    variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(child: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    try:
        text, _ = child.communicate(timeout=seconds)
    finally:
        child.kill()
    return child.returncode, text


def read_until(child: subprocess.Popen[str], *patterns: str) -> str:
    assert child.stdout is not None
    seen = ""
    while not all(re.search(pattern, seen) for pattern in patterns):
        line = child.stdout.readline()
        assert line, seen
        seen += line
    return seen


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_line_carries_its_process_and_the_first_failure_is_the_exit_code(tmp_path):
    script = """
import os, sys, time
process = int(os.environ["JAX_PROCESS_ID"])
print("of", os.environ["JAX_NUM_PROCESSES"], sys.argv[1:])
if process == 1:
    time.sleep(0.2)
    sys.exit(7)
time.sleep(60)
"""
    begin = time.monotonic()
    child = start(tmp_path, ["--processes", "3", "--grace-seconds", "0.3"], script, "--free", "form")
    code, text = finish(child, 20)
    assert code == 7
    for process in range(3):
        assert f"[{process}] of 3 ['--free', 'form']" in text
    assert re.search(r"process 1 \(pid \d+\) failed with exit code 7", text)
    assert re.search(r"still running: process 0 \(pid \d+\), 2 \(pid \d+\)", text)
    assert time.monotonic() - begin < 10


def test_logs_go_to_files_and_process_0_to_the_terminal_too(tmp_path):
    script = "import os; print('I am', os.environ['JAX_PROCESS_ID'])"
    code, text = finish(start(tmp_path, ["--processes", "2", "--log-dir", str(tmp_path / "logs")], script), 20)
    assert (code, text) == (0, "I am 0\n")
    assert [(tmp_path / "logs" / f"process-{n}.log").read_text() for n in range(2)] == ["I am 0\n", "I am 1\n"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_on_once_to_every_process(tmp_path, signum):
    script = """
import signal, sys, time
def stop(signum, frame):
    time.sleep(0.5)
    print("saved")
    sys.exit(128 + signum)
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, stop)
print("ready", flush=True)
time.sleep(60)
"""
    child = start(tmp_path, ["--processes", "2"], script)
    read_until(child, r"\[0\] ready", r"\[1\] ready")
    child.send_signal(signum)
    child.send_signal(signum)  # a terminal and a shell may both send it: no wish to kill
    code, text = finish(child, 20)
    assert code == 128 + signum
    assert sorted(text.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_second_signal_kills_even_what_ignores_signals(tmp_path):
    script = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""
    child = start(tmp_path, ["--processes", "2"], script)
    seen = read_until(child, r"\[0\] ready", r"\[1\] ready")
    child.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    child.send_signal(signal.SIGTERM)
    code, text = finish(child, 20)
    assert code == 128 + signal.SIGKILL
    assert "killing all processes" in text
    assert not any(is_alive(int(pid)) for pid in re.findall(r"ready (\d+)", seen))


@pytest.mark.slow
def test_a_stopped_process_is_named_and_ended(tmp_path):
    script = """
import os, signal, sys, time
if os.environ["JAX_PROCESS_ID"] == "0":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(1)
os.abort()
"""
    code, text = finish(start(tmp_path, ["--processes", "2"], script), 25)
    assert code == 128 + signal.SIGABRT
    assert re.search(r"process 1 \(pid \d+\) was ended by SIGABRT", text)
    assert re.search(r"process 0 \(pid \d+\) is stopped \(SIGSTOP", text)


def test_environment_of_simulated_and_of_real_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_foo --xla_force_host_platform_device_count=8")
    cpu = environment(Local(processes=2, devices=3), 1, 4321)
    assert cpu["XLA_FLAGS"].split() == ["--xla_cpu_foo", "--xla_force_host_platform_device_count=3"]
    assert (cpu["JAX_PLATFORMS"], cpu["JAX_COORDINATOR_ADDRESS"]) == ("cpu", "127.0.0.1:4321")
    gpu = environment(Local(processes=2, devices=3, platform="gpu"), 1, 4321)
    assert (gpu["JAX_PLATFORMS"], gpu["JAX_LOCAL_DEVICE_IDS"]) == ("cuda", "3,4,5")
    assert "XLA_FLAGS" not in gpu


def test_dry_run_and_mistakes(capsys):
    assert main(["--processes", "2", "--dry-run", "--", "-m", "experiments.pretrain", "--seed", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "JAX_PROCESS_ID=1" in lines[1] and lines[1].endswith("-m experiments.pretrain --seed 1")
    assert main(["--processes", "2"]) == 2
    assert "put it after --" in capsys.readouterr().err
    assert main(["--processes", "0", "--", "true"]) == 2
    assert "--processes 0: must be at least 1" in capsys.readouterr().err
    assert main(["--processes", "1", "--", "no-such-program"]) == 2
    assert "cannot start no-such-program" in capsys.readouterr().err


@pytest.mark.slow
def test_four_processes_compute_together_and_a_late_one_is_named_at_a_barrier(tmp_path):
    options = ["--processes", "4", "--devices", "2"]
    code, text = finish(start(tmp_path, options, WORKER, "barrier"), 60)
    assert code == 0, text
    assert text.count("sum 20.0") == 4
    assert re.search(r"4 processes: 0: .*, pid \d+; 1: .*; 3: ", text)
    for process in range(4):
        late = r"error: barrier 'late': process 2 \(.*, pid \d+\) did not come within 1 s"
        assert re.search(rf"\[{process}\] {late}", text), text


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_process_ends_the_others_who_name_it(tmp_path, victim, signum):
    child = start(tmp_path, ["--processes", "2", "--heartbeat-seconds", "4"], WORKER, "loop")
    seen = read_until(child, r"pid 0 \d+", r"pid 1 \d+")
    pids = [int(pid) for _, pid in sorted(re.findall(r"pid (\d) (\d+)", seen))]
    time.sleep(0.5)
    os.kill(pids[victim], signum)
    begin = time.monotonic()
    code, text = finish(child, 40)
    assert time.monotonic() - begin < 20
    assert code != 0
    other = 1 - victim
    if victim == 0:
        unreachable = re.search(r"leader task was preempted/died", text)
        silent = re.search(rf"\[1\] error: process 0 \(.*, pid {pids[0]}\), the coordinator, does not answer", text)
        assert unreachable if signum == signal.SIGKILL else silent, text
    else:
        assert re.search(rf"\[{other}\] .*unhealthy \(stopped sending heartbeats\):\n\[{other}\] {victim}\n", text), (
            text
        )
    how = "was ended by SIGKILL" if signum == signal.SIGKILL else "is stopped"
    assert re.search(rf"process {victim} \(pid {pids[victim]}\) {how}", text), text
    assert not any(map(is_alive, pids))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "victim"), [("sleep", 0), ("sleep", 1), ("native", 1)])
def test_a_process_that_hangs_while_its_heartbeats_go_on_ends_all_and_is_named(tmp_path, mode, victim):
    options = ["--processes", "2", "--heartbeat-seconds", "60", "--hang-seconds", "6"]
    child = start(tmp_path, options, WORKER, mode, str(victim))
    seen = read_until(child, r"pid 0 \d+", r"pid 1 \d+")
    pids = dict(re.findall(r"pid (\d) (\d+)", seen))
    begin = time.monotonic()
    code, text = finish(child, 60)
    assert code == 1 and time.monotonic() - begin < 25
    behind = rf"process {victim} \(.*, pid {pids[str(victim)]}\) is behind: since [\d:]+ at loop, step 20"
    where = "stuck in native code" if mode == "native" else r"worker\.py"
    assert re.search(rf"\[{1 - victim}\] {behind}\n\[{1 - victim}\]  .*({where})", text), text
    assert not re.search(rf"process {1 - victim} \(.*\) is behind", text), text
    assert not any(is_alive(int(pid)) for pid in pids.values())


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others_who_name_it(tmp_path):
    child = start(tmp_path, ["--processes", "2", "--heartbeat-seconds", "4"], WORKER, "raise")
    code, text = finish(child, 40)
    assert code == 1
    assert "[1] ValueError: bad luck" in text
    assert "[1] process 1 of 2 failed: ValueError" in text
    assert re.search(r"\[0\] .*unhealthy \(stopped sending heartbeats\):\n\[0\] 1\n", text), text
    assert re.search(r"process 1 \(pid \d+\) failed with exit code 1", text)
