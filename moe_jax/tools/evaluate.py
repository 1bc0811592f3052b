"""`python -m moe_jax evaluate`: pass@1, pass@k and cons@k on files of problems.

P prompts of a batch, G samples of each in a batch, S prompt columns, N new columns.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moe_jax.config import MeshConfig, SamplingConfig
from moe_jax.tools.model import ONE_DEVICE, Model, ToolError, check_source, load_model, mendable

if TYPE_CHECKING:
    from moe_jax.data.answers import Judge
    from moe_jax.data.problems import Problem

_ASK = "Reason step by step, and put the final answer within \\boxed{}."
_PLACE = "{problem}"
CHAT_PROMPT = f"{_PLACE}\n\n{_ASK}"
"""What a model with a chat template is asked."""
COMPLETION_PROMPT = f"Question: {_PLACE}\n{_ASK}\nAnswer:"
"""What a checkpoint without one completes."""
_STOP = "\nQuestion:"
"""Where a completion of COMPLETION_PROMPT ends: the model has begun to write the next question."""
_BUCKET = 64


def evaluate(
    data: tuple[Path, ...],
    run: Path | None = None,
    checkpoint: str | None = None,
    phase: str | None = None,
    prompt: str | None = None,
    raw: bool = False,
    stop: tuple[str, ...] | None = None,
    samples: int = 8,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    limit: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    out: Path | None = None,
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    mesh: MeshConfig = ONE_DEVICE,
) -> None:
    """Scores a model on problems with known answers: pass@1, pass@k, cons@k, each with its 95 % interval.

    Files hold records in GSM8K's format (question, answer with ####) or MATH's (problem, solution with \\boxed{}). An
    answer counts if it stands in \\boxed{}, in answer tags or behind ####, also where the completion was cut off after
    it. Plain numbers are compared exactly; math-verify judges the others (pip install 'moe_jax[math]'). The folder
    --out gets summary.json and samples.jsonl; Ctrl-C saves what there is, and the same command goes on from there.

    Args:
        data: .jsonl files, or folders: of a folder its test.jsonl, or else all of its .jsonl and .json files.
        run: The folder of a run, finished or in progress.
        checkpoint: A Hugging Face folder, or the name of a repository.
        phase: Whose checkpoint of the run: base, grpo, ... By default the phase trained last, controls aside.
        prompt: What the model is asked, with {problem} for the problem: the user's message where the model has a chat
            template, else the text that it completes. The default asks for steps and \\boxed{}; a run that began with
            random weights reads the problem alone.
        raw: Leave the chat template out.
        stop: Texts at which a completion ends, themselves not part of it. By default "\\nQuestion:" where a checkpoint
            completes the default prompt, else none.
        samples: Completions per problem; the k of cons@k, and the largest k of pass@k.
        max_new_tokens: Tokens after which a completion is cut off.
        temperature: 1 draws from the model's distribution, 0 takes the most probable token (with --samples 1).
        top_k: Only the k most probable tokens; 0 keeps all.
        top_p: Only the smallest set of tokens that holds this much probability.
        min_p: Only tokens at least this times as probable as the most probable one.
        limit: Only so many problems, chosen by the seed; 0 takes all.
        batch_size: Completions drawn at a time.
        seed: Of the order of the problems and of the draws.
        out: By default runs/evaluate/<model>-<data>.
        tokenizer: A tokenizer.json or its folder, for a checkpoint that has none.
        dtype: Arithmetic; by default the run's or the checkpoint's.
        mesh: Devices that a large model and its batches are spread over.
    """
    check_source(run, checkpoint, phase)
    sampling = SamplingConfig(max_new_tokens, temperature, top_k, top_p, min_p)
    for name, value, least in (("samples", samples, 1), ("batch-size", batch_size, 1), ("limit", limit, 0)):
        if value < least:
            raise ToolError(f"--{name} {value}: must be at least {least}")
    if temperature == 0 and samples > 1:
        raise ToolError(f"--samples {samples}: at temperature 0 all samples are the same; use --samples 1")
    if prompt is not None and _PLACE not in prompt:
        raise ToolError(f"--prompt {prompt!r}: must contain {_PLACE}, where the problem goes")

    import jax
    import numpy as np

    from moe_jax.data.answers import Judge

    with mendable():
        sources = [file for path in data for file in problem_files(path)]
        problems = read_sources(sources)
        judge = Judge(problem.answer for _, problem in problems)
    order = np.random.default_rng(seed).permutation(len(problems))[: limit or None]
    chosen = [problems[place] for place in order]

    model, placed = load_model(run, checkpoint, phase, tokenizer, dtype, mesh)
    asking = _asking(model, prompt, raw, stop)
    settings = {
        "model": model.title,
        "weights": model.version,
        "tokenizer": str(tokenizer or ""),
        "data": [str(path) for path in data],
        "problems": len(chosen),
        "data_sha256": hashlib.sha256(json.dumps([[p.prompt, p.answer] for _, p in chosen]).encode()).hexdigest(),
        "prompt": asking.prompt,
        "chat_template": asking.chat,
        "stop": list(asking.stop),
        "samples": samples,
        **{name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")},
        "dtype": model.definition.cfg.dtype,
        "batch_size": batch_size,
        "seed": seed,
    }
    folder = _default_folder(run, checkpoint, data) if out is None else out
    try:
        records = Records.open(folder, settings)
        started, interrupted = time.monotonic(), False
        with jax.set_mesh(placed):
            try:
                _draw(model, asking, sampling, chosen, judge, records, samples, batch_size, seed)
            except KeyboardInterrupt:
                interrupted = True
        summary = {
            "complete": not interrupted,
            **figures(records.rows, [group for group, _ in chosen], samples),
            "seconds_of_this_session": round(time.monotonic() - started, 1),
            "math_verify": judge.uses_math_verify,
            "settings": settings,
        }
        _replace_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise ToolError(f"cannot write {folder}: {error}. Name another folder with --out") from error
    print(_table(summary, folder))
    if interrupted:
        print("Interrupted. The same command goes on from here.")
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------- the problems


def problem_files(path: Path) -> list[Path]:
    """The file itself; of a folder its test.jsonl, or else all .jsonl and .json files in it, sorted.

    Raises:
        DataError: a folder without any.
    """
    from moe_jax.data import DataError

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
    from moe_jax.data.problems import read_problems

    return [
        (file.name if file.suffix == ".jsonl" else file.parent.name, problem)
        for file in files
        for problem in read_problems(file)
    ]


class Asking(NamedTuple):
    """How a model is asked."""

    prompt: str
    chat: bool
    stop: tuple[str, ...]

    def encode(self, problem: str, tokenizer: Any) -> list[int]:
        from moe_jax.data.problem_text import encode_prompt

        text = self.prompt.replace(_PLACE, problem)
        if not self.chat:
            return encode_prompt(text, tokenizer)
        return tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": text}]))

    def cut(self, completion: str) -> tuple[str, bool]:
        """The completion up to the first stop text, and whether there was one."""
        places = [place for text in self.stop if (place := completion.find(text)) >= 0]
        return (completion[: min(places)], True) if places else (completion, False)


def _asking(model: Model, prompt: str | None, raw: bool, stop: tuple[str, ...] | None) -> Asking:
    chat = model.chats and not raw
    if prompt is None:
        prompt = CHAT_PROMPT if chat else COMPLETION_PROMPT if model.pretrained else _PLACE
    if stop is None:
        stop = (_STOP,) if prompt == COMPLETION_PROMPT else ()
    return Asking(prompt, chat, stop)


# ------------------------------------------------------------------------------------------------------- the samples


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
            _replace_file(saved, json.dumps(settings, indent=2) + "\n")
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
        _replace_file(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))
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


def _draw(
    model: Model,
    asking: Asking,
    sampling: SamplingConfig,
    problems: Sequence[tuple[str, Problem]],
    judge: Judge,
    records: Records,
    samples: int,
    batch_size: int,
    seed: int,
) -> None:
    """Draws and scores what is missing."""
    import jax
    import numpy as np

    from moe_jax.data.answers import final_answer
    from moe_jax.rl.grpo import decode_completions, make_generator
    from moe_jax.rng import random_key
    from moe_jax.sampling.sampler import pad_prompts
    from moe_jax.training.run import Progress

    tokenizer = model.tokenizer
    with mendable():
        prompts = [asking.encode(problem.prompt, tokenizer) for _, problem in problems]
    longest = max(map(len, prompts))
    S = -(-longest // _BUCKET) * _BUCKET  # one length for all: compiled once
    context = model.definition.cfg.max_position
    if longest + sampling.max_new_tokens > context:
        raise ToolError(
            f"--max-new-tokens {sampling.max_new_tokens}: with the longest prompt ({longest} tokens) more than the"
            f" model's context of {context}; lower it"
        )
    S = min(S, context - sampling.max_new_tokens)
    G, parts = batches(len(problems), samples, batch_size)
    done = records.complete_batches({number: len(part) * G for number, part in enumerate(parts)})
    generator = make_generator(model.definition, sampling, tokenizer, G)
    with Progress("evaluate", len(parts), len(done)) as progress:
        for number, part in enumerate(parts):
            if number in done:
                continue
            padded = part + part[-1:] * (len(parts[0]) - len(part))
            tokens_PS, mask_PS = pad_prompts([prompts[problem] for problem, _ in padded], tokenizer.pad_id, S)
            key = random_key(seed, "evaluate", number)
            drawn = jax.device_get(generator(model.params, model.rest, tokens_PS, mask_PS, key))
            texts = decode_completions(drawn, tokenizer)
            rows = []
            for row, (problem, first) in enumerate(pair for pair in part for _ in range(G)):
                completion, stopped = asking.cut(texts[row])
                answer, reference = final_answer(completion), problems[problem][1].answer
                rows.append(
                    {
                        "batch": number,
                        "problem": problem,
                        "sample": first + row % G,
                        "correct": judge(answer, reference),
                        "answer": answer,
                        "reference": reference,
                        "tokens": int(np.sum(drawn.mask_BN[row])),
                        "cut_off": not (stopped or bool(drawn.finished_B[row])),
                        "question": problems[problem][1].prompt,
                        "completion": completion,
                    }
                )
            records.add(rows)
            done.add(number)
            progress.update(len(done), correct=float(np.mean([row["correct"] for row in records.rows])))


# ------------------------------------------------------------------------------------------------------- the figures


def figures(rows: Sequence[Mapping[str, Any]], groups: Sequence[str], samples: int) -> dict[str, Any]:
    """pass@k for powers of two and all samples, cons@k, and what the completions are like; of problems that have all
    their samples. `groups` says which file each problem is of; with several, pass@1 of each is there too."""
    import numpy as np

    from moe_jax.analysis.evaluation_statistics import majority_answer, mean_interval, pass_at_k

    by_problem: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row)
    whole = {problem: found for problem, found in by_problem.items() if len(found) == samples}
    if not whole:
        return {"problems": 0}
    right = {problem: [row["correct"] for row in found] for problem, found in whole.items()}
    result: dict[str, Any] = {"problems": len(whole)}
    for k in sorted({2**i for i in range(samples.bit_length())} | {samples}):
        result[f"pass_at_{k}"] = mean_interval([pass_at_k(samples, sum(r), k) for r in right.values()])
    result[f"cons_at_{samples}"] = mean_interval(
        [_majority_is_right(found, majority_answer) for found in whole.values()]
    )
    flat = [row for found in whole.values() for row in found]
    result |= {
        "answered": float(np.mean([row["answer"] is not None for row in flat])),
        "cut_off": float(np.mean([row["cut_off"] for row in flat])),
        "mean_tokens": float(np.mean([row["tokens"] for row in flat])),
    }
    if len(set(groups)) > 1:
        of_group: dict[str, list[list[bool]]] = {}
        for problem, found in right.items():
            of_group.setdefault(groups[problem], []).append(found)
        result["pass_at_1_by_file"] = {group: mean_interval(np.array(of_group[group])) for group in sorted(of_group)}
    return result


def _majority_is_right(rows: Sequence[Mapping[str, Any]], majority_answer: Any) -> float:
    ordered = sorted(rows, key=lambda row: row["sample"])
    majority = majority_answer([row["answer"] for row in ordered])
    return float(next((row["correct"] for row in ordered if row["answer"] == majority and majority is not None), False))


def _table(summary: Mapping[str, Any], folder: Path) -> str:
    def lines() -> Iterator[str]:
        yield f"\n{summary['settings']['model']}: {summary['problems']} problems"
        by_file = summary.get("pass_at_1_by_file", {})
        intervals = {name: value for name, value in summary.items() if isinstance(value, dict) and "mean" in value}
        for name, value in {**intervals, **{f"pass_at_1 {name}": value for name, value in by_file.items()}}.items():
            title = name.replace("_at_", "@")
            yield f"{title:24}{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        if summary["problems"]:
            yield (
                f"answered {summary['answered']:.2f}, cut off {summary['cut_off']:.2f},"
                f" mean length {summary['mean_tokens']:.0f} tokens"
            )
        yield f"Figures and samples: {folder}"

    return "\n".join(lines())


def _default_folder(run: Path | None, checkpoint: str | None, data: Sequence[Path]) -> Path:
    model = Path(checkpoint or "").name or "checkpoint" if run is None else run.resolve().name
    return Path("runs/evaluate") / f"{model}-{'-'.join(path.stem for path in data)}"


def _replace_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
