"""The loop of a phase: resumed and uninterrupted runs are bit-equal, bad numbers and signals stop it cleanly."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import CheckpointConfig
from moe_jax.training.checkpoint import CheckpointError
from moe_jax.training.loop import NonFiniteError, run_phase
from moe_jax.training.run import Run
from moe_jax.training.signals import StopGuard, Stopped


class Counter:
    """Data whose place must be saved."""

    def __init__(self):
        self.place = 0

    def __next__(self):
        self.place += 1
        return self.place

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


class StopAt(StopGuard):
    """A guard whose signal comes before a given check."""

    def __init__(self, check):
        super().__init__()
        self.left = check

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise Stopped(15)


def walk(run, guard, steps, every=2, poison=None):
    data = Counter()

    @jax.jit
    def update(state, x):
        return state * 0.9 + jnp.sin(x), state.sum()

    def body(state, step):
        state, loss = update(state, jnp.float32(next(data)))
        return state, {"loss": jnp.where(step == poison, jnp.nan, loss), "load": jnp.ones((2, 3))}

    return run_phase(run, guard, "walk", steps, jnp.ones(3), body, checkpoint=CheckpointConfig(every=every), data=data)


def losses(run):
    return [(row["step"], row["loss"]) for row in run.metrics("walk")]


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, stop):
    with Run.open(tmp_path / "whole", "test", {}) as run, StopGuard() as guard:
        whole, expected = walk(run, guard, 8), losses(run)
    with Run.open(tmp_path / "cut", "test", {}) as run:
        with pytest.raises(Stopped):
            walk(run, StopAt(stop), 8)
        assert len(losses(run)) == stop
    with Run.open(tmp_path / "cut", "test", {}) as run, StopGuard() as guard:
        resumed = walk(run, guard, 8)
        assert losses(run) == expected
    np.testing.assert_array_equal(whole, resumed)


def test_a_finished_phase_only_loads(tmp_path):
    with Run.open(tmp_path / "run", "test", {}) as run, StopGuard() as guard:
        first, seen = walk(run, guard, 4), losses(run)
        np.testing.assert_array_equal(first, walk(run, guard, 4))
        assert losses(run) == seen


def test_lines_after_the_last_checkpoint_are_written_once(tmp_path):
    """A crash (not a signal) loses the steps since the last checkpoint; their lines are replaced."""
    with Run.open(tmp_path / "run", "test", {}) as run, StopGuard() as guard:
        expected = walk(run, guard, 6, every=4)
        rows = losses(run)
    with Run.open(tmp_path / "crash", "test", {}) as run:
        run.log("walk", 3, {"loss": 123.0})
        run.log("other", 5, {"loss": 4.0})
        with StopGuard() as guard:
            np.testing.assert_array_equal(walk(run, guard, 6, every=4), expected)
        assert losses(run) == rows
        assert len(run.metrics("other")) == 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with Run.open(tmp_path / "run", "test", {}) as run, StopGuard() as guard:
        with pytest.raises(NonFiniteError, match=r"walk, step 4: loss is nan.*checkpoint is of step 2"):
            walk(run, guard, 8, poison=3)
        with run.checkpointer("walk") as checkpoints:
            assert checkpoints.steps() == [2]
        walk(run, guard, 8)
        assert [step for step, _ in losses(run)] == list(range(1, 9))


def test_lost_checkpoints_are_an_error_and_never_a_silent_fresh_start(tmp_path):
    with Run.open(tmp_path / "run", "test", {}) as run, StopGuard() as guard:
        walk(run, guard, 8)
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        with pytest.raises(CheckpointError, match="metrics of 8 steps of walk but no checkpoint"):
            walk(run, guard, 8)
        assert len(losses(run)) == 8
