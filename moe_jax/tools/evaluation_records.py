"""The folder of an evaluation: its settings, the samples drawn so far, and which batches are still to draw."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.tools.model import ToolError


@dataclass
class Records:
    """The samples drawn so far, in memory and in samples.jsonl; a batch is there whole or not at all."""

    file: Path
    rows: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Records:
        """Begins a folder, or takes up what an evaluation with the same settings left in it.

        Raises:
            ToolError: the folder has an evaluation with other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file, saved = folder / "samples.jsonl", folder / "settings.json"
        if not saved.exists():
            if file.exists():
                raise ToolError(f"{file} is there without a settings.json: use another --out, or delete it")
            replace_file(saved, json.dumps(settings, indent=2) + "\n")
        try:
            before = json.loads(saved.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ToolError(f"{saved} is not JSON ({error}): use another --out, or delete the folder") from error
        if before != json.loads(json.dumps(settings)):
            name = next(name for name in settings if before.get(name) != settings[name])
            raise ToolError(
                f"{folder} has an evaluation with another {name}: {before.get(name)!r} there, {settings[name]!r} here;"
                " use another --out, or delete the folder"
            )
        rows = []
        with suppress(FileNotFoundError):
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
                rows.append(json.loads(line))
        return cls(file, rows)

    def complete_batches(self, size_of: Mapping[int, int]) -> set[int]:
        """Which batches are there; rows of one that was cut off while it was written are dropped."""
        counts: dict[int, int] = {}
        for row in self.rows:
            counts[row["batch"]] = counts.get(row["batch"], 0) + 1
        complete = {batch for batch, count in counts.items() if count == size_of[batch]}
        self.rows = [row for row in self.rows if row["batch"] in complete]
        replace_file(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))
        return complete

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows += rows


def batches(problems: int, samples: int, batch_size: int) -> tuple[int, list[list[tuple[int, int]]]]:
    """G, and for each batch its (problem, first sample) pairs; a batch has at most `batch_size` rows.

    They are fixed by the arguments, so that an interrupted evaluation draws what an uninterrupted one would.
    """
    G = next(size for size in range(min(samples, batch_size), 0, -1) if samples % size == 0)
    pairs = [(problem, first) for problem in range(problems) for first in range(0, samples, G)]
    P = batch_size // G
    return G, [pairs[start : start + P] for start in range(0, len(pairs), P)]


def replace_file(path: Path, text: str) -> None:
    """Writes a file as a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
