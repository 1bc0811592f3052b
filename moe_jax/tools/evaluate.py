"""`python -m moe_jax evaluate`: pass@1, pass@k and cons@k on files of problems.

P prompts of a batch, G samples of each in a batch, S prompt columns, N new columns.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moe_jax.config import MeshConfig, SamplingConfig
from moe_jax.tools.evaluation_records import Records, batches, replace_file
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

    from moe_jax.analysis.evaluation_statistics import figures, figures_table
    from moe_jax.data.answers import Judge
    from moe_jax.data.problem_files import problem_files, read_sources

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
        replace_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise ToolError(f"cannot write {folder}: {error}. Name another folder with --out") from error
    print(f"\n{model.title}: {summary['problems']} problems\n{figures_table(summary)}\nFigures and samples: {folder}")
    if interrupted:
        print("Interrupted. The same command goes on from here.")
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------ the questions


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


def _default_folder(run: Path | None, checkpoint: str | None, data: Sequence[Path]) -> Path:
    model = Path(checkpoint or "").name or "checkpoint" if run is None else run.resolve().name
    return Path("runs/evaluate") / f"{model}-{'-'.join(path.stem for path in data)}"
