"""The loop of one phase: resume, step, log, checkpoint, stop.

A phase is a name, a number of steps and a function (state, step) → (state, metrics). The loop restores the newest
intact checkpoint, so running a finished phase again only loads its result.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from moe_jax.config import CheckpointConfig
from moe_jax.training.checkpoint import Checkpointer, CheckpointError
from moe_jax.training.distributed import gather
from moe_jax.training.run import Progress, Run
from moe_jax.training.signals import StopGuard, Stopped
from moe_jax.training.watchdog import mark

State = TypeVar("State")
logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite: the message names the step and the last good checkpoint."""


class Stateful(Protocol):
    """A source of data whose place can be saved: `data.text.TrainBatches`, `data.problem_text.ProblemText`."""

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


def run_phase(
    run: Run,
    guard: StopGuard,
    phase: str,
    steps: int,
    state: State,
    body: Callable[[State, int], tuple[State, Mapping[str, Any]]],
    *,
    checkpoint: CheckpointConfig,
    data: Stateful | None = None,
    show: tuple[str, ...] = ("loss",),
) -> State:
    """Runs a phase to its end, from its newest checkpoint or from `state`, and returns the last state.

    Args:
        run: where metrics and checkpoints go.
        guard: stops the phase at a signal, after saving.
        phase: its name.
        steps: its length.
        state: a tree of arrays; with their shapes and shardings also what a checkpoint is restored to.
        body: one step, counted from 0. Metrics may still be on the device: they are read while the next step runs.
        checkpoint: when to save.
        data: read by `body`; its place is saved with the state of the same step.
        show: metrics in the progress bar.

    Raises:
        NonFiniteError: loss or gradient norm is not finite; nothing is saved from that step on.
        Stopped: a signal came; the state of the last step is saved.
        CheckpointError, RunError: the folder cannot be read or written.
    """
    mark(f"the start of {phase}")
    with run.checkpointer(phase, keep=checkpoint.keep) as checkpoints:
        restored = checkpoints.restore(state)
        start = 0
        if restored is not None:
            start, state = restored.step, restored.state
            if data is not None:
                data.set_state(restored.extra["data"])
        elif rows := run.metrics(phase):
            _explain_fresh_start(run, phase, rows[-1]["step"], checkpoint.every)
        run.rewind(phase, start)
        if start >= steps:
            return state
        loop = _Loop(run, phase, checkpoints, state, start, data)
        guard.on_emergency = loop.save_in_emergency
        with Progress(phase, steps, start) as progress:
            try:
                for step in range(start, steps):
                    guard.check()
                    mark(f"{phase}, step {step + 1}")
                    state, metrics = body(state, step)
                    mark(f"{phase}, after step {step + 1}")
                    loop.finish_step(progress, show)
                    loop.begin_finishing(state, step + 1, metrics)
                    on_device = any(isinstance(value, jax.Array) for value in metrics.values())
                    save = (step + 1) % checkpoint.every == 0 or step + 1 == steps
                    if save or not on_device:
                        loop.finish_step(progress, show)
                    if save:
                        loop.save()
                mark(f"the end of {phase}")
                checkpoints.wait()
            except Stopped as stop:
                loop.finish_step(progress, show)
                loop.save()
                stop.where = loop.where()
                raise
            finally:
                guard.on_emergency = loop.where
    return state


def _explain_fresh_start(run: Run, phase: str, step: int, every: int) -> None:
    """There are metrics of a phase but no checkpoint: right if it was killed before its first one, and only then."""
    if step > 2 * every:
        raise CheckpointError(
            f"{run.dir} has metrics of {step} steps of {phase} but no checkpoint of it, though every {every} steps one"
            " was written: bring the folder checkpoints back from a copy, or start again with another --run-dir"
        )
    logger.warning("%s stopped at step %d, before its first checkpoint: it starts again.", phase, step)


def _merged(states: Sequence[Any]) -> Any:
    """One place in the data from those of all processes, each of which may know only the rows that it reads."""
    if not all(isinstance(state, dict) for state in states):
        return states[0]
    names = {name: None for state in states for name in state}
    return {name: _merged([state[name] for state in states if name in state]) for name in names}


class _Loop:
    """The newest state and what of it is already checked, logged and saved; used by the stop signal's thread too."""

    def __init__(self, run: Run, phase: str, checkpoints: Checkpointer, state: Any, step: int, data: Stateful | None):
        self.run, self.phase, self.checkpoints, self.data = run, phase, checkpoints, data
        self.state, self.step, self.saved = state, step, step
        self.data_state = None if data is None else data.get_state()
        self.pending: Mapping[str, Any] | None = None
        self.time = time.perf_counter()
        self.lock = threading.RLock()

    def begin_finishing(self, state: Any, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes a step's results, without waiting for the device."""
        with self.lock:
            self.state, self.step, self.pending = state, step, metrics
            self.data_state = None if self.data is None else self.data.get_state()

    def finish_step(self, progress: Progress | None = None, show: tuple[str, ...] = ()) -> None:
        """Waits for the newest step, checks and logs its metrics."""
        with self.lock:
            if self.pending is None:
                return
            metrics = {name: np.asarray(value).tolist() for name, value in jax.device_get(dict(self.pending)).items()}
            self.pending = None
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics.get(name, 0.0)):
                    last = f"the last good checkpoint is of step {self.saved}" if self.saved else "there is none before"
                    raise NonFiniteError(
                        f"{self.phase}, step {self.step}: {name} is {metrics[name]}; nothing of it is saved, {last}"
                        f" ({self.run.dir}). Lower the learning rate or clip gradients (optimizer.max_grad_norm), with"
                        " another --run-dir."
                    )
            now = time.perf_counter()
            metrics["step_time"], self.time = now - self.time, now
            self.run.log(self.phase, self.step, metrics)
        if progress is not None:
            progress.update(self.step, **{name: metrics[name] for name in show if name in metrics})

    def save(self) -> None:
        """Saves the newest finished state, if it is not saved yet."""
        with self.lock:
            if self.step > self.saved:
                self.checkpoints.save(self.step, self.state, {"data": _merged(gather(self.data_state))})
                self.saved = self.step

    def save_in_emergency(self) -> str | None:
        """Saves from another thread while the main one compiles or computes; returns where the run stopped.

        With several processes it saves nothing: all would have to, of the same step.
        """
        if jax.process_count() > 1:
            return self.where()
        deadline = time.monotonic() + 60
        while any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)) and time.monotonic() < deadline:
            time.sleep(0.05)  # donated to a step in flight, whose result is about to take its place
        self.finish_step()
        self.save()
        self.checkpoints.wait()
        return self.where()

    def where(self) -> str | None:
        """The last step that is saved."""
        return f"{self.phase}, step {self.saved}" if self.saved else None
