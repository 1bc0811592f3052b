"""Who holds up a run: decided from what the processes say of themselves. tests/launch/test_local.py has real ones."""

import json
import threading

import pytest

from moe_jax.training import watchdog
from moe_jax.training.watchdog import Report, Watch, explanation, held_up

NAMES = ["host-a, pid 1", "host-b, pid 2", "host-c, pid 3"]


def report(marks, waits=False, stack=("File x", "File y"), done=False):
    return Report(marks, f"walk, step {marks}", "12:00:00", list(stack) if stack else None, waits, done)


@pytest.mark.parametrize(
    ("reports", "silent", "expected"),
    [
        ([report(7), report(5), report(7)], [9, 9, 9], []),  # slow, not hanging
        ([report(7), report(5), report(7)], [9, 11, 9], [1]),  # the first to stand still
        ([report(7), report(5), report(7)], [11, 9, 9], [1]),  # whoever is at the limit, the one behind is named
        ([report(5, waits=True), report(5), report(5, waits=True)], [11, 11, 11], [1]),  # the others wait for it
        ([report(5, waits=True)] * 3, [11] * 3, [0, 1, 2]),  # nobody joined the same collective
        ([report(5, done=True), report(9), report(9)], [99, 1, 1], []),  # its work is done
        ([report(5, done=True), report(9, waits=True), report(9)], [99, 11, 11], [2]),
    ],
)
def test_who_is_behind(reports, silent, expected):
    assert held_up(dict(enumerate(reports)), dict(enumerate(silent)), 10) == expected


def test_the_error_says_who_since_when_and_where():
    text = explanation([1], {1: report(5)}, NAMES, 10)
    assert "no progress within 10 s" in text
    assert "process 1 (host-b, pid 2) is behind: since 12:00:00 at walk, step 5\n  File x\n  File y" in text
    assert "the same command resumes" in text and watchdog.HANG in text
    assert "it is stuck in native code" in explanation([1], {1: report(5, stack=None)}, NAMES, 10)
    assert "… and 2 more processes" in explanation(range(10), {n: report(1) for n in range(10)}, ["a"] * 10, 1)


class Store:
    """JAX's key-value store, of one process."""

    def __init__(self):
        self.entries = {}

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.entries[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.entries.items() if key.startswith(prefix)]


def test_a_process_that_stands_still_is_found_with_its_stack(monkeypatch):
    store, ended, found = Store(), threading.Event(), []
    store.key_value_set("moe_jax/progress/1", json.dumps(report(3)._asdict()), True)
    watch = Watch(store, 0, NAMES, 0.4)

    def end(behind, reports):
        found.append((behind, reports))
        watch._ended.set()
        ended.set()

    monkeypatch.setattr(watch, "_end", end)
    for step in range(4):
        watch.mark(f"walk, step {step}")
    watch.start()
    assert ended.wait(20)
    watch.stop()
    behind, reports = found[0]
    assert behind == [1]
    assert reports[0].marks == 4 and reports[0].place == "walk, step 3"
    assert "test_watchdog.py" in "".join(reports[0].stack)
    assert json.loads(store.entries["moe_jax/progress/0"])["done"]


def test_without_other_processes_a_mark_does_nothing():
    watchdog.mark("walk, step 1")
    assert watchdog._watch is None
