"""`python -m moe_jax rollouts`: the samples of a reinforcement-learning phase, in the terminal or as one page."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from moe_jax.tools.model import ToolError

_PAGE_STEPS = 10
_TERMINAL_SAMPLES = 10
_OWN_PLACE = ("step", "prompt", "answer", "completion", "reward", "advantage", "tokens", "finished")
"""Fields with a place of their own; all others are parts of the reward."""


def rollouts(
    run: Path,
    phase: str | None = None,
    step: tuple[int, ...] = (),
    sort: Literal["reward", "advantage", "length"] = "reward",
    reverse: bool = False,
    limit: int | None = None,
    html: Path | None = None,
) -> None:
    """Shows the samples that a reinforcement-learning phase drew: prompts, completions, rewards, advantages.

    Args:
        run: The folder of a run, finished or in progress.
        phase: Which phase: grpo, random_reward, ... By default the one that wrote last.
        step: Which steps; by default the last one, and on a page up to 10 between the first and the last.
        sort: What the samples of a step are sorted by, the highest first; length is in tokens.
        reverse: The lowest first.
        limit: Samples shown of each step; 0 shows all. By default 10, and on a page all.
        html: Write a page here instead, one file that needs nothing else, to open in a browser or to send.
    """
    if limit is not None and limit < 0:
        raise ToolError(f"--limit {limit}: must be 0 (all samples) or more")
    phase, files = _phase_files(run, phase)
    steps = step or _default_steps(list(files), _PAGE_STEPS if html else 1)
    for number in steps:
        if number not in files:
            raise ToolError(
                f"--step {number}: {run} has no such step of {phase}; it has {len(files)}, from {min(files)} to"
                f" {max(files)}"
            )
    key = "tokens" if sort == "length" else sort
    count = (0 if html else _TERMINAL_SAMPLES) if limit is None else limit
    found: list[tuple[int, list[dict[str, Any]], int]] = []
    for number in steps:
        rows = sorted(_read(files[number]), key=lambda row: _number(row[key]), reverse=not reverse)
        found.append((number, rows[: count or None], len(rows)))
    order = f"sorted by {sort}, the {'lowest' if reverse else 'highest'} first"
    if html is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        width = shutil.get_terminal_size((100, 24)).columns
        for number, rows, total in found:
            print(_heading(f"{run}: {phase}, step {number}; {len(rows)} of {total} samples, {order}", colour))
            for place, row in enumerate(rows, start=1):
                print(terminal_sample(row, place, width, colour))
        return
    try:
        html.write_text(page(f"{run.name}: {phase}", [(number, rows) for number, rows, _ in found]), encoding="utf-8")
    except OSError as error:
        raise ToolError(f"cannot write {html}: {error}. Name another file with --html") from error
    samples = sum(len(rows) for _, rows, _ in found)
    print(f"{samples} samples of {phase}, steps {', '.join(map(str, steps))}: {html}")


# --------------------------------------------------------------------------------------------------------- the samples


def _phase_files(run: Path, phase: str | None) -> tuple[str, dict[int, Path]]:
    """The phase, and its file of each step, in order."""
    folder = run / "rollouts"
    phases = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    by_phase = {name: {int(file.stem): file for file in sorted((folder / name).glob("*.jsonl"))} for name in phases}
    by_phase = {name: files for name, files in by_phase.items() if files}
    if not by_phase:
        raise ToolError(
            f"{run} has no rollouts: name the folder of a run that has done a step of reinforcement learning"
        )
    if phase is None:
        phase = max(by_phase, key=lambda name: max(file.stat().st_mtime for file in by_phase[name].values()))
    if phase not in by_phase:
        raise ToolError(f"--phase {phase}: {run} has no rollouts of it; it has {', '.join(by_phase)}")
    return phase, by_phase[phase]


def _default_steps(steps: Sequence[int], count: int) -> list[int]:
    """The last step, and others at even distances from the first on."""
    if count == 1 or len(steps) <= count:
        return list(steps[-count:])
    return [steps[round(place * (len(steps) - 1) / (count - 1))] for place in range(count)]


def _read(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            missing = [name for name in ("prompt", "completion", "reward", "advantage", "tokens") if name not in row]
        except (ValueError, TypeError) as error:
            raise ToolError(f"{file}, line {number} is not a sample ({error}): delete this file") from error
        if missing:
            raise ToolError(f"{file}, line {number} is not a sample (it has no {missing[0]}): delete this file")
        rows.append(row)
    return rows


def _number(value: Any) -> float:
    """A saved number; null, which stands for NaN, is taken for the lowest."""
    return -math.inf if value is None else float(value)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-" if value is None else str(value)


def _figures(row: dict[str, Any]) -> dict[str, str]:
    """What stands above a completion: reward, its parts, advantage, length."""
    parts = {name: value for name, value in row.items() if name not in _OWN_PLACE}
    figures = {"reward": row["reward"], "advantage": row["advantage"], "tokens": row["tokens"], **parts}
    return {name: _shown(value) for name, value in figures.items()}


# -------------------------------------------------------------------------------------------------------- the terminal


def _heading(text: str, colour: bool) -> str:
    return f"\n\x1b[1m{text}\x1b[0m" if colour else f"\n{text}"


def terminal_sample(row: dict[str, Any], place: int, width: int, colour: bool) -> str:
    """One sample, wrapped to `width` columns; control characters of its texts are shown, not obeyed."""
    reward, advantage = _number(row["reward"]), _number(row["advantage"])
    figures = "  ".join(f"{name} {value}" for name, value in _figures(row).items())
    title = f"[{place}] {figures}" + ("" if row.get("finished", True) else "  cut off")
    title = textwrap.fill(title, width, subsequent_indent="    ")
    if colour:
        shade = 32 if advantage > 0 else 31 if advantage < 0 else 33 if reward else 2
        title = f"\x1b[{shade}m{title}\x1b[0m"
    texts = [("prompt", row["prompt"]), ("answer", row.get("answer", "")), ("completion", row["completion"])]
    lines = [f"\n{title}"]
    for name, text in texts:
        if text:
            label = f"  {name:11}"
            lines.append(_wrapped(visible(text), label, width))
    return "\n".join(lines)


def _wrapped(text: str, label: str, width: int) -> str:
    blank, room, lines = " " * len(label), max(width - len(label), 20), []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, room, drop_whitespace=False, replace_whitespace=False) or [""]
    return "\n".join((blank if number else label) + line for number, line in enumerate(lines))


def visible(text: str) -> str:
    """The text with its control characters, new lines and tabs aside, written out: they could command a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


# ------------------------------------------------------------------------------------------------------------ the page

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }
body { max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem }
form { position: sticky; top: 0; padding: .6rem 0; background: Canvas; display: flex; gap: 1rem; flex-wrap: wrap }
input[type=search] { flex: 1; min-width: 10rem }
article { border: 1px solid #8886; border-left: 4px solid #8886; border-radius: 4px; padding: .5rem .8rem }
article { margin: .7rem 0 }
article.up { border-left-color: #2a9d55 } article.down { border-left-color: #c8453c }
header { font-size: .85em; opacity: .85 } header span { margin-right: .9em; white-space: nowrap }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .35rem 0; font-size: .95em }
.label { opacity: .6; font-size: .8em }
[hidden] { display: none }
"""

_SCRIPT = """
const form = document.forms[0], samples = document.querySelector("main"), all = [...samples.children];
function show() {
  const words = form.text.value.toLowerCase(), sign = form.order.value === "lowest" ? 1 : -1, key = form.sort.value;
  const value = article => Number(article.dataset[key]);
  let count = 0;
  for (const article of [...all].sort((a, b) => sign * (value(a) - value(b)))) {
    const fits = (form.step.value === "" || article.dataset.step === form.step.value)
      && (form.kind.value === "" || article.dataset.kind === form.kind.value)
      && article.textContent.toLowerCase().includes(words);
    article.hidden = !fits;
    count += fits;
    samples.append(article);
  }
  document.getElementById("count").textContent = count + " of " + all.length + " samples";
}
form.addEventListener("input", show);
form.addEventListener("submit", event => event.preventDefault());
show();
"""


def page(title: str, steps: Sequence[tuple[int, Sequence[dict[str, Any]]]]) -> str:
    """The samples of some steps as one HTML file, which can be sorted, filtered and searched.

    It loads nothing, and its policy forbids it to; all texts are escaped.
    """
    articles = [_article(step, row) for step, rows in steps for row in rows]
    options = "".join(f'<option value="{step}">step {step}</option>' for step, _ in steps)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<form>
<select name="step"><option value="">all steps</option>{options}</select>
<select name="sort"><option>reward</option><option>advantage</option><option value="tokens">length</option></select>
<select name="order"><option>highest</option><option>lowest</option></select>
<select name="kind"><option value="">right and wrong</option><option>right</option><option>wrong</option></select>
<input type="search" name="text" placeholder="text in the samples">
<span id="count">{len(articles)} samples</span>
</form>
<main>
{"".join(articles)}</main>
<script>{_SCRIPT}</script>
</html>
"""


def _article(step: int, row: dict[str, Any]) -> str:
    advantage = _number(row["advantage"])
    kind = "right" if row.get("accuracy") else "wrong"
    tone = "up" if advantage > 0 else "down" if advantage < 0 else ""
    figures = {"step": str(step), **_figures(row)} | ({} if row.get("finished", True) else {"cut off": "yes"})
    spans = "".join(f"<span>{escape(name)} <b>{escape(value)}</b></span>" for name, value in figures.items())
    data = {"step": step, "kind": kind} | {name: _number(row[name]) for name in ("reward", "advantage", "tokens")}
    attributes = " ".join(f'data-{name}="{str(value).replace("inf", "Infinity")}"' for name, value in data.items())
    texts = [("prompt", row["prompt"]), ("answer", row.get("answer", "")), ("completion", row["completion"])]
    shown = "".join(
        f'<div class="label">{name}</div><pre>{escape(visible(text))}</pre>' for name, text in texts if text
    )
    return f'<article class="{tone}" {attributes}><header>{spans}</header>{shown}</article>\n'
