import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from moe_jax.training.signals import StopGuard, Stopped, farewell


def _start(body: str) -> subprocess.Popen:
    """A process that runs `body` within a guard, and has printed "ready" when this returns."""
    script = """
import hashlib, os, signal, sys, time
from moe_jax.training.signals import Stopped, StopGuard, farewell

def long_call_in_c():  # like a compilation: releases the GIL, and no Python code runs in this thread for minutes
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def ready():
    print("ready", flush=True)

guard = StopGuard(grace_seconds=0.2)
""" + textwrap.dedent(body)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _finish(process: subprocess.Popen) -> tuple[str, str]:
    try:
        return process.communicate(timeout=20)
    finally:
        process.kill()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_check_raises_at_the_next_safe_point_and_handlers_are_restored(signum):
    before = signal.getsignal(signum)
    steps = 0
    with pytest.raises(Stopped) as stopped, StopGuard(grace_seconds=30) as guard:
        guard.check()
        os.kill(os.getpid(), signum)
        for _ in range(1000):
            steps += 1
            time.sleep(0.01)
            guard.check()
    assert steps < 1000
    assert stopped.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before


def test_signal_after_the_last_safe_point_is_not_forgotten():
    with pytest.raises(Stopped), StopGuard(grace_seconds=30):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)


def test_processes_on_their_way_to_the_point_they_agreed_on_are_given_the_time():
    process = _start("""
points = 0
def agree(signum):
    global points
    points += signum is not None
    return signum if points > 8 else None

try:
    with StopGuard(grace_seconds=0.5, agree=agree) as guard:
        ready()
        for _ in range(100):
            time.sleep(0.2)  # eight of them take longer than the grace
            guard.check()
except Stopped as stop:
    print("agreed", points)
    sys.exit(stop.exit_code)
""")
    process.send_signal(signal.SIGTERM)
    out, err = _finish(process)
    assert (process.returncode, out) == (143, "agreed 9\n"), err


def test_an_error_in_the_body_comes_first():
    with pytest.raises(ValueError, match="mine"), StopGuard(grace_seconds=30):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("mine")


def test_stopped_is_not_swallowed_by_except_exception():
    assert not issubclass(Stopped, Exception)


def test_no_op_outside_of_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopGuard() as guard:
            guard.check()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_farewell_says_where_and_how_to_go_on():
    assert farewell(signal.SIGTERM, "grpo, step 12") == (
        "SIGTERM: stopped, saved at grpo, step 12. The same command resumes."
    )
    assert "nothing to save yet" in farewell(signal.SIGINT, None)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_saves_and_exits_during_a_long_call_that_runs_no_python(signum, code, tmp_path):
    saved = tmp_path / "saved"
    process = _start(f"""
        def save():
            open({str(saved)!r}, "w").write("state")
            return "grpo, step 7"
        with guard:
            guard.on_emergency = save
            ready()
            long_call_in_c()
    """)
    process.send_signal(signum)
    _, err = _finish(process)
    assert process.returncode == code, err
    assert saved.read_text() == "state"
    assert err.splitlines()[-1].endswith("stopped, saved at grpo, step 7. The same command resumes.")


def test_main_thread_goes_no_further_once_the_emergency_has_begun(tmp_path):
    progress = tmp_path / "progress"
    process = _start(f"""
        def save():
            time.sleep(0.5)  # meanwhile the main thread comes to its safe point
            return "step 1"
        with guard:
            guard.on_emergency = save
            ready()
            time.sleep(0.4)
            guard.check()
        open({str(progress)!r}, "w").write("too far")
    """)
    process.send_signal(signal.SIGTERM)
    _, err = _finish(process)
    assert process.returncode == 143, err
    assert "saved at step 1" in err
    assert not progress.exists()


def test_failed_emergency_save_is_reported():
    process = _start("""
        def save():
            raise OSError("disk full")
        with guard:
            guard.on_emergency = save
            ready()
            long_call_in_c()
    """)
    process.send_signal(signal.SIGTERM)
    _, err = _finish(process)
    assert process.returncode == 1
    assert "could not be saved: disk full" in err


def test_second_signal_exits_at_once_also_while_saving():
    process = _start("""
        def save():
            print("saving", flush=True)
            time.sleep(100)
        with guard:
            guard.on_emergency = save
            ready()
            long_call_in_c()
    """)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = _finish(process)
    assert process.returncode == 130
    assert "stopped at once" in err


def test_the_same_signal_twice_within_a_moment_counts_once():
    process = _start("""
        try:
            with guard:
                ready()
                try:
                    for _ in range(1000):
                        time.sleep(0.01)
                        guard.check()
                except Stopped:
                    time.sleep(0.5)  # saving
                    raise
        except Stopped as stopped:
            print(farewell(stopped.signum, "step 1"), file=sys.stderr)
            sys.exit(stopped.exit_code)
    """)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = _finish(process)
    assert process.returncode == 130
    assert "saved at step 1" in err


@pytest.mark.slow
def test_saves_and_exits_during_a_compilation(tmp_path):
    """The real thing: XLA compiles a long program while the signal comes, and a checkpoint of arrays is written."""
    process = _start(f"""
        import jax, jax.numpy as jnp
        from moe_jax.training.checkpoint import Checkpointer
        def slow(x):
            for i in range(4000):
                x = jnp.sort(jnp.sin(x) * i)
            return x
        state = {{"w": jnp.arange(1000.0)}}
        checkpointer = Checkpointer({str(tmp_path)!r})
        def save():
            checkpointer.save(3, state, {{}})
            checkpointer.wait()
            return "step 3"
        lowered = jax.jit(slow).lower(state["w"])
        with guard:
            guard.on_emergency = save
            ready()
            lowered.compile()
            print("compiled", flush=True)
    """)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = _finish(process)
    assert "compiled" not in out
    assert process.returncode == 143, err
    assert "saved at step 3" in err

    from moe_jax.training.checkpoint import Checkpointer

    assert Checkpointer(tmp_path).steps() == [3]
