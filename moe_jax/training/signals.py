"""Ctrl-C and SIGTERM: save, stop, and let the same command resume. Also during a long compilation or evaluation.

Python runs a signal handler only when the main thread is back in Python. While that thread compiles a program or waits
for a device, a flag that a handler sets comes too late: pre-emption kills the process first. So a second thread is
woken by the signal itself (`signal.set_wakeup_fd`). It gives the main thread `grace_seconds` to reach a safe point, and
otherwise saves the last completed state itself and ends the process.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEAT_SECONDS = 1.0
"""Launchers forward the Ctrl-C that the terminal sent to their children too: a second one so soon is no wish."""


class Stopped(BaseException):
    """A signal asked the run to stop. Like KeyboardInterrupt it is no Exception, so that only the loop catches it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.where: str | None = None
        """What is saved, for `farewell`; set by the loop that saved it."""

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process that this signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


def farewell(signum: int, where: str | None) -> str:
    """The one line that says where the run stopped, e.g. `where="grpo, step 120"`, or None if nothing is saved yet."""
    saved = f"saved at {where}" if where else "nothing to save yet"
    return f"{signal.Signals(signum).name}: stopped, {saved}. The same command resumes."


class StopGuard:
    """Within this context SIGINT and SIGTERM stop the run cleanly. Outside of the main thread it does nothing.

    The loop calls `check` at its safe points, and when `Stopped` is raised it saves, still within the context. If it
    comes to none for `grace_seconds`, a background thread calls `on_emergency`, writes `farewell` to standard error,
    and ends the process with 130 or 143 (1 if saving failed). A second signal, more than a second later, ends the
    process at once.

    In a run of several processes `agree` decides at each `check` whether all stop there: it gets the signal that came
    to this process, or None, and returns the one to stop for (`distributed.StopAgreement`). While they go on to the
    point that they agreed on, `grace_seconds` counts from the last `check`.
    """

    def __init__(self, grace_seconds: float = 5.0, agree: Callable[[int | None], int | None] = lambda signum: signum):
        self.on_emergency: Callable[[], str | None] | None = None
        """Called in the background thread, while the main thread may be anywhere. It saves the last completed state,
        unless it is saved already, and returns where the run stopped (see `farewell`). While a step that donates this
        state is in flight it waits for the new one."""
        self._grace_seconds = grace_seconds
        self._agree = agree
        self._signum: int | None = None
        self._checked = 0.0  # when the last safe point was
        self._noticed = threading.Event()  # the main thread is on its way out
        self._lock = threading.Lock()  # decides who stops the run: the main thread or the watcher
        self._emergency = False
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> StopGuard:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        # The watcher does the work; a handler in Python is what makes the interpreter write to the pipe.
        self._previous = {signum: signal.signal(signum, lambda *_: None) for signum in _SIGNALS}
        self._watcher = threading.Thread(target=self._watch, name="stop-guard", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is None:
            return
        self._noticed.set()
        if self._stopping():
            self._watcher.join()  # for ever: it ends the process
        signal.set_wakeup_fd(self._previous_fd)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        os.write(self._write_fd, b"\0")
        self._watcher.join()
        self._watcher = None
        os.close(self._read_fd)
        os.close(self._write_fd)
        if self._signum is not None and error is None:
            raise Stopped(self._signum)  # it came after the last safe point: not to be forgotten

    def check(self) -> None:
        """A safe point: the state is whole and can be saved.

        Raises:
          Stopped: a signal has arrived.
        """
        self._checked = time.monotonic()
        if self._watcher is None or (signum := self._agree(self._signum)) is None:
            return
        if self._stopping():
            self._watcher.join()
        raise Stopped(signum)

    def _stopping(self) -> bool:
        """Whether the watcher is ending the process. If not, it leaves that to the main thread from now on."""
        with self._lock:
            if not self._emergency:
                self._noticed.set()
            return self._emergency

    def _watch(self) -> None:
        since = 0.0
        while True:
            for signum in os.read(self._read_fd, 64):
                if signum == 0:
                    return
                if signum not in _SIGNALS:
                    continue
                if self._signum is not None:
                    if time.monotonic() - since < _REPEAT_SECONDS:
                        continue
                    _exit(128 + signum, f"{signal.Signals(signum).name} again: stopped at once.")
                self._signum, since = signum, time.monotonic()
                _say(f"{signal.Signals(signum).name}: saving and stopping (a second one stops at once) …")
                # A thread of its own, so that this one sees a second signal.
                threading.Thread(target=self._end_unless_noticed, args=(signum,), daemon=True).start()

    def _end_unless_noticed(self, signum: int) -> None:
        deadline = time.monotonic() + self._grace_seconds
        while (left := max(deadline, self._checked + self._grace_seconds) - time.monotonic()) > 0:
            if self._noticed.wait(left):
                return
        with self._lock:
            if self._noticed.is_set():
                return
            self._emergency = True
        try:
            where = self.on_emergency() if self.on_emergency is not None else None
        except BaseException as error:
            _exit(1, f"{signal.Signals(signum).name}: stopped, but the last state could not be saved: {error}")
        _exit(128 + signum, farewell(signum, where))


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _exit(code: int, line: str) -> NoReturn:
    _say(line)
    with suppress(Exception):
        logging.shutdown()
        sys.stdout.flush()
    os._exit(code)
