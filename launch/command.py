"""What the launchers share: the command after `--`, programs that must be there, and how they fail."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


class LaunchError(Exception):
    """A launcher cannot do what it was asked for: one line says what and how to mend it."""


def run_main(program: str, body: Callable[[list[str], list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Splits the command line at `--` and calls `body(options, command)`; its exit code, or 2 for a `LaunchError`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        return body(arguments[:at], arguments[at + 1 :])
    except LaunchError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def full_command(command: Sequence[str], python: str, example: str) -> list[str]:
    """The command to run: `-m module …` and `file.py …` are Python's.

    Raises:
        LaunchError: there is none.
    """
    if not command:
        raise LaunchError(f"no command: put it after --, as in `{example} -- -m experiments.pretrain --seed 1`")
    if command[0].startswith("-") or command[0].endswith(".py"):
        return [python, *command]
    return list(command)


def require(value: str | None, flag: str, remedy: str) -> str:
    """The value of a setting without which nothing can be done."""
    if not value:
        raise LaunchError(f"{flag} is missing: {remedy}")
    return value


class Shell:
    """Runs programs; with `dry_run` it prints what it would run instead, as lines to paste in a shell."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def require_tool(self, tool: str, remedy: str) -> None:
        if not self.dry_run and shutil.which(tool) is None:
            raise LaunchError(f"{tool} is not installed (not on PATH): {remedy}")

    def run(self, command: Sequence[str]) -> int:
        """Runs a command whose output the user sees; its exit code (0 in a dry run)."""
        if self.dry_run:
            print(shlex.join(command), flush=True)
            return 0
        return subprocess.call(command)

    def check(self, command: Sequence[str], remedy: str) -> None:
        """`run`, which must succeed."""
        if code := self.run(command):
            raise LaunchError(f"`{shlex.join(command)}` ended with exit code {code}: {remedy}")

    def output(self, command: Sequence[str]) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of a command that changes nothing; it runs in a dry run too."""
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout.strip(), done.stderr.strip()


def repository() -> Path:
    """The folder that holds pyproject.toml: what is copied to other machines."""
    return Path(__file__).resolve().parent.parent
