"""The folder of a run: what it is, what it measured, what it wrote, and the lock that keeps a second process out.

    config.json            experiment, config, package versions, command
    metrics.jsonl          one line per `log`: phase, step, elapsed (seconds, over all sessions), then the metrics
    tensorboard/<phase>/   the same as TensorBoard events
    checkpoints/<phase>/   see checkpoint.py
    tokenizer/             a copy of the tokenizer, unless it is the byte-level one
    anything else          written whole or not at all, by `write_json` and `write_rows`

All JSON is strict: NaN, which it cannot hold, is written as null, and the infinities as "Infinity" and "-Infinity".
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.distributed import barrier, gather

logger = logging.getLogger(__name__)

_SHARED_SECONDS = 60.0
"""How long a folder on a network may take to show one host what another one wrote."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunError(RuntimeError):
    """A run folder that cannot be used: the message names the folder, the cause and the remedy."""


class Run:
    """A run folder that this process holds. Made by `Run.open`; a context manager.

    Of several processes only the first one holds it and writes; for the others everything that writes does nothing.
    They read the same folder.
    """

    def __init__(self, run_dir: Path, lock: TextIO | None, resumed: bool):
        self.dir = run_dir
        self.writes = lock is not None
        self.resumed = resumed
        self._lock = lock
        self._events: dict[str, EventsWriter] = {}
        self._earlier = max((row["elapsed"] for row in self._rows()), default=0.0)
        self._start = time.monotonic()

    @classmethod
    def open(cls, run_dir: str | Path, experiment: str, config: Mapping[str, Any]) -> Run:
        """Creates the folder of a run, or takes up the one that the same experiment and config left.

        Args:
          experiment: its name, e.g. "grpo_math".
          config: nested dict of JSON values; all that decides the results, and nothing else.

        Raises:
          RunError: it is no folder but a bucket, belongs to another experiment or config, a live process holds it, not
            all processes share it, or it cannot be written.
        """
        if re.match(r"\w+:/", str(run_dir)):
            raise RunError(
                f"--run-dir {run_dir}: must be a folder; mount the bucket as one on every host (gcsfuse, s3fs)"
            )
        run_dir = Path(run_dir).absolute()
        if jax.process_index() > 0:
            barrier("run folder")
            _require_shared(run_dir)
            return cls(run_dir, None, resumed=True)
        with _writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = _lock(run_dir)
            try:
                wanted = {"experiment": experiment, "config": json.loads(_dumps(config))}
                resumed = (run_dir / "config.json").exists()
                if resumed:
                    _compare(run_dir, load_config(run_dir), wanted)
                else:
                    _refuse_orphans(run_dir)
                    content = {**wanted, **_versions(), "command": shlex.join(sys.orig_argv)}
                    _write(run_dir / "config.json", _dumps(content, indent=2) + "\n")
                _drop_rows(run_dir / "metrics.jsonl", lambda row: False)
                barrier("run folder")
                return cls(run_dir, lock, resumed)
            except BaseException:
                lock.close()
                raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder."""
        with suppress(OSError):  # each event was flushed when it was written
            for writer in self._events.values():
                writer.close()
        self._events.clear()
        if self._lock is not None:
            self._lock.close()

    def discard(self) -> None:
        """Takes back a folder in which nothing was done yet, so that a mended command finds it free."""
        if self.resumed or (self.dir / "metrics.jsonl").exists() or (self.dir / "checkpoints").exists():
            return
        with suppress(OSError):
            shutil.rmtree(self.dir / "tokenizer", ignore_errors=True)
            (self.dir / "config.json").unlink()
            (self.dir / ".lock").unlink()
            self.dir.rmdir()  # unless something else is in it

    @property
    def elapsed(self) -> float:
        """Seconds over all sessions of this run, each counted up to its last logged line."""
        return self._earlier + time.monotonic() - self._start

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl and, for metrics that are numbers, the TensorBoard scalars `<phase>/<name>`.

        Args:
          metrics: numbers, or nested lists of numbers.

        Raises:
          RunError: the folder cannot be written.
        """
        if not self.writes:
            return
        values = {name: value if isinstance(value, list) else float(value) for name, value in metrics.items()}
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        line = _dumps({"phase": phase, "step": int(step), "elapsed": round(self.elapsed, 3), **values}) + "\n"
        with _writing(self.dir):
            _append(self.dir / "metrics.jsonl", line)
            scalars = [Summary.Value(tag=f"{phase}/{name}", simple_value=value) for name, value in numbers.items()]
            event = Event(wall_time=time.time(), step=int(step), summary=Summary(value=scalars))
            self._write_event(phase, event)

    def rewind(self, phase: str, step: int) -> None:
        """Forgets what was logged for `phase` after `step`: the phase goes on from a checkpoint of that step.

        Raises:
          RunError: the folder cannot be written.
        """
        if not self.writes:
            return
        with _writing(self.dir):
            _drop_rows(self.dir / "metrics.jsonl", lambda row: row["phase"] == phase and row["step"] > step)
            if (self.dir / "tensorboard" / phase).exists():
                restart = SessionLog(status=SessionLog.START)  # readers drop earlier events from this step on
                self._write_event(phase, Event(wall_time=time.time(), step=step + 1, session_log=restart))

    def metrics(self, phase: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of one phase or of all, in the order in which they were logged."""
        return [row for row in self._rows() if phase is None or row["phase"] == phase]

    def path(self, *parts: str) -> Path:
        """A path in the folder, whose parent exists."""
        path = self.dir.joinpath(*parts)
        with _writing(self.dir):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def checkpointer(self, phase: str, keep: int = 2) -> Checkpointer:
        """The checkpoints of one phase."""
        return Checkpointer(self.dir / "checkpoints" / phase, keep=keep)

    def write_json(self, name: str, data: Any) -> None:
        """Writes a JSON file of the folder, whole or not at all."""
        if not self.writes:
            return
        with _writing(self.dir):
            _write(self.path(name), _dumps(data, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """Reads what `write_json` wrote.

        Raises:
          RunError: the file is absent or is not JSON.
        """
        return _read_json(self.dir / name)

    def result(self, name: str) -> Any:
        """What `write_json` wrote, by this session or an earlier one, or None; the same for all processes, which have
        to call it alike.

        Raises:
          RunError: the file is not JSON.
        """
        return gather(self.read_json(name) if self.writes and (self.dir / name).exists() else None)[0]

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes a JSONL file of the folder, e.g. "rollouts/grpo/000010.jsonl", whole or not at all."""
        if not self.writes:
            return
        with _writing(self.dir):
            _write(self.path(name), "".join(_dumps(row) + "\n" for row in rows))

    def rows(self, name: str) -> list[dict[str, Any]] | None:
        """What `write_rows` wrote, by this session or an earlier one, or None; for all processes, as `result`."""
        return gather(_read_rows(self.dir / name) if self.writes and (self.dir / name).exists() else None)[0]

    def _rows(self) -> list[dict[str, Any]]:
        rows = _read_rows(self.dir / "metrics.jsonl")
        return [{name: math.nan if value is None else _from_json(value) for name, value in row.items()} for row in rows]

    def _write_event(self, phase: str, event: Event) -> None:
        # tensorboardX's SummaryWriter hands events to a thread that dies of a full disk and then blocks its caller for
        # ever. One folder per phase, because readers purge a whole folder when a phase is rewound.
        if phase not in self._events:
            folder = self.path("tensorboard", phase, "events")
            self._events[phase] = EventsWriter(str(folder), filename_suffix=f".{os.getpid()}.{time.time_ns()}")
        self._events[phase].write_event(event)
        self._events[phase].flush()


def load_config(run_dir: str | Path) -> dict[str, Any]:
    """The config.json of a run, finished or in progress: "experiment", "config", "versions", "command".

    Raises:
      RunError: the folder is not that of a run, or its config.json is damaged.
    """
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise RunError(f"{run_dir} is not the folder of a run: it has no config.json. Check --run-dir (or --run)")
    content = _read_json(path)
    if not isinstance(content, dict) or not {"experiment", "config"} <= content.keys():
        raise RunError(f"{path} lacks `experiment` or `config`: use another --run-dir, or delete {run_dir}")
    return content


def _lock(run_dir: Path) -> TextIO:
    """Holds `.lock` until it is closed; the kernel releases it when the process ends, however it ends."""
    lock = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (the Run closes it)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise RunError(
            f"{run_dir} is in use by another process ({owner}): wait for it, stop it, or use another --run-dir"
        ) from None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def _require_shared(run_dir: Path) -> None:
    """That this process, which is not the first, sees what the first one wrote."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (run_dir / "config.json").exists():
        if time.monotonic() > deadline:
            raise RunError(
                f"process {jax.process_index()} on {platform.node()} does not see {run_dir / 'config.json'}, which"
                " process 0 wrote: --run-dir must lie on a disk that all processes share"
            )
        time.sleep(0.5)


def _compare(run_dir: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    remedy = f"Use another --run-dir, or delete {run_dir} to start it again."
    if saved["experiment"] != wanted["experiment"]:
        raise RunError(
            f"{run_dir} belongs to the experiment {saved['experiment']!r}, this is {wanted['experiment']!r}. {remedy}"
        )
    ours, theirs = dict(_flat(wanted["config"])), dict(_flat(saved["config"]))
    names = [name for name in {**theirs, **ours} if theirs.get(name, "absent") != ours.get(name, "absent")]
    if names:
        lines = [f"  {name}: {theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here" for name in names]
        more = [f"  … and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise RunError(f"{run_dir} was made with another config:\n" + "\n".join(lines[:10] + more) + f"\n{remedy}")
    if (before := saved.get("versions")) != (now := _versions()["versions"]):
        logger.warning("%s was begun with %s and resumes with %s: results may not be bit-equal.", run_dir, before, now)


def _refuse_orphans(run_dir: Path) -> None:
    orphans = [name for name in ("metrics.jsonl", "checkpoints") if (run_dir / name).exists()]
    if orphans:
        raise RunError(
            f"{run_dir} holds {' and '.join(orphans)} but no config.json that says of what: bring config.json back,"
            f" use another --run-dir, or delete the folder"
        )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of a nested dict as (dotted name, JSON text)."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, json.dumps(value)


def _versions() -> dict[str, dict[str, str]]:
    versions = {"python": platform.python_version()}
    return {"versions": versions | {name: importlib.metadata.version(name) for name in _PACKAGES}}


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = {
            errno.ENOSPC: "the disk is full. Make room",
            errno.EDQUOT: "the disk quota is used up. Make room",
            errno.EROFS: "the file system is read-only. Use another --run-dir",
            errno.EACCES: "no permission to write. Restore it, or use another --run-dir",
            errno.EPERM: "no permission to write. Restore it, or use another --run-dir",
        }.get(error.errno or 0, "use another --run-dir, or repair this one")
        raise RunError(
            f"cannot write the run folder {run_dir} ({error}): {remedy}; what was written before is intact, and the"
            f" same command resumes"
        ) from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _append(path: Path, line: str) -> None:
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError:
        with suppress(OSError):  # half a line would spoil the next one
            os.truncate(path, size)
        raise


def _read_json(path: Path) -> Any:
    try:
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it or bring it back from a copy") from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, less a last line that was cut off while it was written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}, line {number} is not JSON ({error}): delete this line, then run again") from error
    return rows


def _drop_rows(path: Path, drop: Any) -> None:
    """Rewrites a JSONL file without the rows that `drop` names and without a torn last line."""
    if not path.exists():
        return
    rows = _read_rows(path)
    text = "".join(json.dumps(row) + "\n" for row in rows if not drop(row))
    if text.encode() != path.read_bytes():
        _write(path, text)


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_to_json(value), indent=indent, allow_nan=False)


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if hasattr(value, "dtype"):  # NumPy and JAX
        return _to_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _from_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return float(value) if value in ("Infinity", "-Infinity") else value


class Progress:
    """Shows how far a phase is: a bar on a terminal, a line every 10 seconds elsewhere (a log file, a pipe)."""

    def __init__(self, phase: str, total: int, start: int = 0, file: TextIO | None = None):
        """`total`: steps of the phase; `start`: those that earlier sessions did; `file`: standard error by default."""
        self._phase, self._total, self._step = phase, total, start
        self._file = file if file is not None else sys.stderr
        self._bar, self._silent = None, jax.process_index() > 0
        if self._file.isatty() and not self._silent:
            self._bar = tqdm(total=total, initial=start, desc=phase, file=self._file, dynamic_ncols=True, leave=True)
        self._first: tuple[int, float] | None = (
            None  # when the first step ended: it compiles, and says nothing of speed
        )
        self._shown_at = -math.inf
        self._text = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, **values: float) -> None:
        """Step number `step` (counted from 1) is done; `values`, e.g. reward=0.4, are shown beside it."""
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._step)
        self._step, self._text = step, text
        self._first = self._first or (step, now)
        if self._bar is None and not self._silent and (now - self._shown_at >= 10 or step >= self._total):
            self._shown_at = now
            self._print(now)

    def close(self) -> None:
        """Leaves the last state standing."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, now: float) -> None:
        assert self._first is not None
        steps, seconds = self._step - self._first[0], now - self._first[1]
        left = f"  {tqdm.format_interval(seconds / steps * (self._total - self._step))} left" if steps else ""
        print(f"{self._phase} {self._step}/{self._total}  {self._text}{left}", file=self._file, flush=True)
