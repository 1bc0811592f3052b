"""Files of problems, and folders of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_jax.data import DataError
from moe_jax.data.problems import Problem, read_problems


def problem_files(path: Path) -> list[Path]:
    """The file itself; of a folder its test.jsonl, or else all .jsonl and .json files in it, sorted.

    Raises:
        DataError: a folder without any.
    """
    if not path.is_dir():
        return [path]
    if (path / "test.jsonl").is_file():
        return [path / "test.jsonl"]
    files = sorted(file for file in path.rglob("*.json*") if file.suffix in (".json", ".jsonl"))
    if not files:
        raise DataError(f"{path} has no .jsonl or .json file: name a file of problems, or a folder of such files")
    return files


def read_sources(files: Sequence[Path]) -> list[tuple[str, Problem]]:
    """(group, problem) of all files; the group is a .jsonl file's name, or the folder of .json files."""
    return [
        (file.name if file.suffix == ".jsonl" else file.parent.name, problem)
        for file in files
        for problem in read_problems(file)
    ]
