"""A process that hangs while its heartbeats go on is named by the others, and all end.

JAX's heartbeats come from a thread of its own: a process whose Python code never returns, or that waits for a
collective that another never joins, looks alive. So each process counts the places that it comes by (`mark`: safe
points, steps, gatherings), all in the same order, and publishes its count through JAX's key-value store. A thread in
each watches all counts. One that stands still for `seconds` holds up the run: every process then ends with an error
that says which is behind, since when and where, within a tenth of `seconds` more; the same command resumes.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

HANG = "MOE_JAX_HANG_SECONDS"
"""Changes `seconds` for all processes of a run: more than any compilation, validation or save takes."""

_KEYS = "moe_jax/progress/"
_FAILED = 1
_SHOWN_FRAMES, _SHOWN_PROCESSES = 8, 8
_LIBRARIES = {"jax", "jaxlib", "orbax"}
_HERE = Path(__file__).parent


class Report(NamedTuple):
    """What a process last said of itself."""

    marks: int
    """Places that it came by."""
    place: str
    """The last one that has a name."""
    since: str
    """When it came there, by its own clock."""
    stack: list[str] | None = None
    """Where its main thread is, outermost first; only after half the limit without a mark."""
    waits: bool = False
    """Its main thread is inside JAX or Orbax, where it waits for devices or for other processes."""
    done: bool = False
    """It has nothing more to do."""


def mark(place: str = "") -> None:
    """Says that this process has come to another place, e.g. "grpo, step 12"; "" keeps the place's name.

    All processes must come by the same ones. Alone, or before `start`, it does nothing.
    """
    if _watch is not None:
        _watch.mark(place)


def start(client: Any, process: int, names: Sequence[str], seconds: float) -> None:
    """Watches the run from now on.

    Args:
        client: of JAX's coordination service.
        process: this one's number.
        names: every process's, for messages.
        seconds: how long a process may stay at one place.
    """
    global _watch
    _watch = Watch(client, process, names, seconds)
    _watch.start()
    atexit.register(_watch.stop)  # runs before JAX's own, which lets go of the client


def held_up(reports: Mapping[int, Report], silent_seconds: Mapping[int, float], seconds: float) -> list[int]:
    """The processes that hold up the run: none as long as no process has been at one place for `seconds`.

    They are those that have come by the fewest places; of these, those whose main thread does not wait inside JAX, if
    there is one.
    """
    running = {process: report for process, report in reports.items() if not report.done}
    if not any(silent_seconds[process] >= seconds for process in running):
        return []
    least = min(report.marks for report in running.values())
    behind = [process for process, report in running.items() if report.marks == least]
    return [process for process in behind if not running[process].waits] or behind


def explanation(behind: Sequence[int], reports: Mapping[int, Report], names: Sequence[str], seconds: float) -> str:
    """The error that names them."""
    lines = [f"error: no progress within {seconds:g} s"]
    for process in behind[:_SHOWN_PROCESSES]:
        report = reports[process]
        where = f"at {report.place}" if report.place else "before the first step"
        lines.append(f"process {process} ({names[process]}) is behind: since {report.since} {where}")
        if report.stack is None:
            lines.append("  its interpreter does not answer: it is stuck in native code")
        else:
            lines += [f"  {frame}" for frame in report.stack[-_SHOWN_FRAMES:]]
    if len(behind) > _SHOWN_PROCESSES:
        lines.append(f"… and {len(behind) - _SHOWN_PROCESSES} more processes")
    lines.append(
        f"All processes end now; the same command resumes from the last checkpoint. If nothing hung, raise {HANG}"
        " (launch.local: --hang-seconds)."
    )
    return "\n".join(lines)


class Watch:
    """This process's reports, and the thread that reads everyone's."""

    def __init__(self, client: Any, process: int, names: Sequence[str], seconds: float):
        self._client, self._process, self._names, self._seconds = client, process, names, seconds
        self._interval = min(max(seconds / 40, 0.1), 30.0)
        self._report = Report(0, "", _clock())
        self._marked = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def mark(self, place: str) -> None:
        self._marked = time.monotonic()
        self._report = Report(self._report.marks + 1, place or self._report.place, _clock())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Says that this process is done, and lets go of the client."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._report = self._report._replace(done=True)
        with suppress(Exception):  # the coordinator may be gone
            self._publish()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            # If native code keeps the interpreter, nothing but this can end the process; it prints every thread.
            faulthandler.dump_traceback_later(1.1 * self._seconds + 1, exit=True)
            try:
                self._publish()
                reports = self._read()
            except Exception:  # without a coordinator JAX ends this process
                continue
            behind = held_up(reports, self._silent_seconds(reports), self._seconds)
            if behind and not self._ended.is_set():
                self._end(behind, reports)

    def _publish(self) -> None:
        report = self._report
        if time.monotonic() - self._marked > self._seconds / 2:
            stack, waits = _main_thread()
            report = report._replace(stack=stack, waits=waits)
        self._client.key_value_set(f"{_KEYS}{self._process}", json.dumps(report._asdict()), allow_overwrite=True)

    def _read(self) -> dict[int, Report]:
        entries = self._client.key_value_dir_get(_KEYS)
        return {int(key.rsplit("/", 1)[1]): Report(**json.loads(value)) for key, value in entries}

    def _silent_seconds(self, reports: Mapping[int, Report]) -> dict[int, float]:
        """By this process's clock: how long it has seen no other count."""
        now = time.monotonic()
        for process, report in reports.items():
            if process not in self._seen or self._seen[process][0] != report.marks:
                self._seen[process] = report.marks, now
        return {process: now - self._seen[process][1] for process in reports}

    def _end(self, behind: Sequence[int], reports: Mapping[int, Report]) -> None:
        print(explanation(behind, reports, self._names, self._seconds), file=sys.stderr, flush=True)
        if self._process in behind:
            faulthandler.dump_traceback(all_threads=True)
        if self._process == 0:
            time.sleep(3 * self._interval)  # the others read from this process
        os._exit(_FAILED)


_watch: Watch | None = None
"""Of this process's run."""


def _main_thread() -> tuple[list[str], bool]:
    """The main thread's frames, outermost first, and whether it waits inside a library that talks to others."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    frames = list(traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False))[::-1]
    file = Path(frames[-1].filename)
    waits = bool(_LIBRARIES & set(file.parts)) or (file.parent == _HERE and file.name == "distributed.py")
    return [f'File "{f.filename}", line {f.lineno}, in {f.name}' for f in frames], waits


def _clock() -> str:
    return time.strftime("%H:%M:%S")
