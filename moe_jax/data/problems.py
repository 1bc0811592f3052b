"""Problems with answers that a rule can check, and the supervised text that a base model learns from.

Three sources behind one interface: generated arithmetic, the files of GSM8K (arXiv:2110.14168), and any task of the
package reasoning-gym. Everything drawn depends on nothing but (seed, purpose, step, count), so that a resumed run sees
the problems of an uninterrupted one, and nothing drawn is ever one of the held-out problems.

Shapes: P problems, N terms of the longest problem.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_jax.config import ProblemConfig, arithmetic_problems_by_length
from moe_jax.data import DataError
from moe_jax.rng import random_generator


@dataclass(frozen=True)
class Problem:
    prompt: str
    """What the model reads, to the last character."""
    answer: str
    """The reference answer; empty where a task has a checker but no reference."""
    key: str
    """Identity for the exclusion of held-out problems."""
    worked: str | None = None
    """The working without mistakes, as it stands between the think tags; None where the source has none."""
    entry: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    """reasoning_gym: what the task's checker needs."""
    chat: bool = False
    """Whether the prompt was written by a chat template, which begins it as the model expects: no <bos> is added."""


@dataclass(frozen=True)
class Document:
    """Supervised text: the completion carries its tags and ends in <eos>."""

    prompt: str
    completion: str
    worked: bool
    """Whether the completion shows the working (with or without mistakes)."""


class ProblemSource(Protocol):
    test: list[Problem]
    """The held-out problems: fixed for a seed, all different, in nothing that `sample` or `documents` return."""
    works_in_equations: bool
    """Whether the working consists of steps such as 7+1=8, so that a text without one is no working."""

    def sample(self, step: int, count: int, purpose: str) -> list[Problem]:
        """`count` problems for a step of a phase; the same arguments give the same problems, always."""
        ...

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        """`count` documents, exactly round(worked_fraction · count) of them worked if the source has working."""
        ...

    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Whether an answer is right; there is no partial credit."""
        ...


def load_problems(cfg: ProblemConfig, seed: int) -> ProblemSource:
    """The source that `cfg.source` names.

    Raises:
        DataError: a file that is missing or malformed (file and line are named), a package or task that is missing.
    """
    sources = {"arithmetic": ArithmeticSource, "gsm8k": GSM8KSource, "reasoning_gym": ReasoningGymSource}
    return sources[cfg.source](cfg, seed)


def tagged_completion(think: str | None, answer: str) -> str:
    """The text of a completion; `think` None leaves the think tags out."""
    working = "" if think is None else f"<think>{think}</think>"
    return f"{working}<answer>{answer}</answer><eos>"


_NUMBER = re.compile(r"\$?\s*([+-]?)\s*\$?\s*([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(\.[0-9]*)?")


def parse_number(text: str) -> Decimal | None:
    """The exact value of a number as people write it (`1,080`, `+5`, `$ 12.00`, `-3.`), or None for anything else.

    Surrounding spaces, a dollar sign, a leading +, commas between thousands and trailing decimal zeros make no
    difference. A text with more than the number in it, `12 or 13` for one, is no number.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    sign, whole, decimals = match.groups()
    return Decimal(f"{sign}{whole.replace(',', '')}{decimals or ''}")


def same_answer(answer: str, reference: str) -> bool:
    """Equal as numbers, exactly, or, where the reference is no number, equal but for surrounding spaces."""
    number = parse_number(reference)
    return answer.strip() == reference.strip() if number is None else parse_number(answer) == number


def _document_kinds(cfg: ProblemConfig, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` documents show the working, and which leave the think tags out: exact shares, random places."""
    num_worked = round(cfg.worked_fraction * count)
    num_bare = round(cfg.bare_fraction * (count - num_worked))
    place = rng.permutation(count)
    return place < num_worked, (place >= num_worked) & (place < num_worked + num_bare)


class ArithmeticSource:
    """Sums (and differences) of small numbers, such as `7+1+5+9?`; every number of terms is equally frequent.

    A worked document is a chain of partial sums, `7+1=8+5=13+9=22`, in which each step is wrong by ±1 to ±9 with
    probability `step_error_rate`; the mistake is carried on into the answer. A guess is the truth plus
    round(N(0, guess_std · √terms)), without any working.

    The held-out problems are excluded by their prompt. Each number of terms has an equal share of them, but at most
    half of its problems, so that some are left to train on.
    """

    works_in_equations = True

    def __init__(self, cfg: ProblemConfig, seed: int):
        self._cfg, self._seed = cfg, seed
        rng = random_generator(seed, "held-out problems")
        test: dict[str, Problem] = {}
        for length, count in self._held_out_by_length().items():
            unique: dict[str, Problem] = {}
            while len(unique) < count:
                terms_PN = self._draw_terms(np.full(count, length), rng)
                unique |= {problem.key: problem for problem in self._problems(terms_PN)}
            test |= dict(list(unique.items())[:count])
        self._held_out = set(test)
        self.test = [list(test.values())[i] for i in rng.permutation(len(test))]

    def sample(self, step: int, count: int, purpose: str) -> list[Problem]:
        rng = random_generator(self._seed, purpose, step)
        return self._problems(self._sample_terms(count, rng))

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        cfg, rng = self._cfg, random_generator(self._seed, purpose, step)
        terms_PN = self._sample_terms(count, rng)
        worked_P, bare_P = _document_kinds(cfg, count, rng)
        used_PN = terms_PN != 0
        wrong_PN = used_PN & (rng.random(terms_PN.shape) < cfg.step_error_rate)
        wrong_PN[:, 0] = False
        errors_PN = rng.integers(1, 10, terms_PN.shape) * rng.choice([-1, 1], terms_PN.shape) * wrong_PN
        chains_PN = np.cumsum(terms_PN + errors_PN, axis=1).tolist()
        noise_P = rng.normal(0, 1, count) * cfg.guess_std * np.sqrt(used_PN.sum(axis=1))
        guesses_P = (terms_PN.sum(axis=1) + np.rint(noise_P).astype(int)).tolist()
        documents = []
        for row, terms in enumerate(_term_lists(terms_PN)):
            if worked_P[row]:
                chain = chains_PN[row][: len(terms)]
                completion = tagged_completion(_write_chain(terms, chain), str(chain[-1]))
            else:
                completion = tagged_completion(None if bare_P[row] else "", str(guesses_P[row]))
            documents.append(Document(_write_prompt(terms), completion, bool(worked_P[row])))
        return documents

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return same_answer(answer, problem.answer)

    def _held_out_by_length(self) -> dict[int, int]:
        left, counts = self._cfg.test_problems, {}
        limits = {length: number // 2 for length, number in arithmetic_problems_by_length(self._cfg).items()}
        for index, (length, limit) in enumerate(limits.items()):
            counts[length] = min(-(-left // (len(limits) - index)), limit)
            left -= counts[length]
        return counts

    def _sample_terms(self, count: int, rng: np.random.Generator) -> np.ndarray:
        lengths_P = rng.integers(self._cfg.min_terms, self._cfg.max_terms + 1, count)
        terms_PN = self._draw_terms(lengths_P, rng)
        while True:
            prompts = [_write_prompt(terms) for terms in _term_lists(terms_PN)]
            again = [row for row, prompt in enumerate(prompts) if prompt in self._held_out]
            if not again:
                return terms_PN
            terms_PN[again] = self._draw_terms(lengths_P[again], rng)

    def _draw_terms(self, lengths_P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Terms with their signs, zero after a problem's last one; the first term is positive."""
        cfg, shape = self._cfg, (len(lengths_P), self._cfg.max_terms)
        terms_PN = rng.integers(1, cfg.max_term + 1, shape)
        if cfg.operations == "+-":
            terms_PN[:, 1:] *= rng.choice([-1, 1], (shape[0], shape[1] - 1))
        return terms_PN * (np.arange(cfg.max_terms) < lengths_P[:, None])

    def _problems(self, terms_PN: np.ndarray) -> list[Problem]:
        chains_PN = np.cumsum(terms_PN, axis=1).tolist()
        problems = []
        for terms, chain in zip(_term_lists(terms_PN), chains_PN, strict=True):
            prompt = _write_prompt(terms)
            problems.append(Problem(prompt, str(chain[-1]), prompt, _write_chain(terms, chain[: len(terms)])))
        return problems


def _term_lists(terms_PN: np.ndarray) -> list[list[int]]:
    return [[term for term in row if term] for row in terms_PN.tolist()]


def _write_prompt(terms: list[int]) -> str:
    return "".join([f"{term:+d}" for term in terms])[1:] + "?"


def _write_chain(terms: list[int], chain: list[int]) -> str:
    steps = [f"{term:+d}={value}" for term, value in zip(terms[1:], chain[1:], strict=True)]
    return str(terms[0]) + "".join(steps)


class GSM8KSource:
    """Grade-school word problems, from `train.jsonl` and `test.jsonl` of the original release (arXiv:2110.14168).

    A record has the fields `question` and `answer`, whose last line is `#### N`; the calculator annotations
    (`<<48/2=24>>`) are taken out of the working. All of `test.jsonl` is held out, and so is a training problem whose
    question, spaces and capitals aside, stands there too. Training goes through the problems in a new order each epoch.

    A worked document is the reference solution as it is, without deliberate mistakes. A guess is off by
    round(N(0, guess_std · √lines of the solution)).
    """

    works_in_equations = False

    def __init__(self, cfg: ProblemConfig, seed: int):
        self._cfg, self._seed = cfg, seed
        train_path, test_path = Path(cfg.path) / "train.jsonl", Path(cfg.path) / "test.jsonl"
        self.test = list({problem.key: problem for problem in _read_gsm8k(test_path)}.values())
        held_out = {problem.key for problem in self.test}
        self._train = [problem for problem in _read_gsm8k(train_path) if problem.key not in held_out]
        if not self._train:
            raise DataError(f"{train_path}: all of its problems are in {test_path} too: none is left to train on")

    def sample(self, step: int, count: int, purpose: str) -> list[Problem]:
        size, orders = len(self._train), {}
        problems = []
        for position in range(step * count, (step + 1) * count):
            epoch, index = divmod(position, size)
            if epoch not in orders:
                orders[epoch] = random_generator(self._seed, f"{purpose} epoch", epoch).permutation(size)
            problems.append(self._train[orders[epoch][index]])
        return problems

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        rng = random_generator(self._seed, purpose, step)
        worked_P, bare_P = _document_kinds(self._cfg, count, rng)
        noise_P = rng.normal(0, 1, count) * self._cfg.guess_std
        documents = []
        for row, problem in enumerate(self.sample(step, count, purpose)):
            working = problem.worked or ""
            if worked_P[row]:
                completion = tagged_completion(working, problem.answer)
            else:
                error = round(noise_P[row] * (working.count("\n") + 1) ** 0.5)
                completion = tagged_completion(None if bare_P[row] else "", str(Decimal(problem.answer) + error))
            documents.append(Document(problem.prompt, completion, bool(worked_P[row])))
        return documents

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return same_answer(answer, problem.answer)


def _read_gsm8k(path: Path) -> list[Problem]:
    remedy = "ProblemConfig.path must name the folder with train.jsonl and test.jsonl of GSM8K's original release"
    return _read_jsonl(path, _gsm8k_problem, remedy)


def read_problems(path: Path) -> list[Problem]:
    """The problems of a .jsonl file with one record a line, or of a .json file with one record.

    A record has GSM8K's fields, `question` and `answer` (ending in `#### N`), or those of MATH (arXiv:2103.03874),
    `problem` and `solution` (with the answer in its last `\\boxed{}`); a field `answer` beside `problem`, as MATH-500
    has it, goes before the solution. A MATH answer is LaTeX as it stands.

    Raises:
        DataError: a file that cannot be read, a record of neither format (file and line are named), no record at all.
    """
    remedy = "give a .jsonl file of problems, or a .json file with one"
    return _read_jsonl(path, _any_problem, remedy, whole=path.suffix == ".json")


def _read_jsonl(
    path: Path, parse: Callable[[dict[str, Any]], Problem], remedy: str, *, whole: bool = False
) -> list[Problem]:
    """A problem for each line that is not blank, or one for the `whole` file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    problems = []
    for number, line in enumerate([content] if whole else content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            problems.append(parse(_record(line)))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}; correct or remove the line") from error
    if not problems:
        raise DataError(f"{path}: holds no problem; download the original release again")
    return problems


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    return record


def _text(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record.get(name), str):
        found = f"{type(record[name]).__name__}, not text" if name in record else "missing"
        raise ValueError(f"field {name!r} is {found}")
    return record[name]


def _any_problem(record: dict[str, Any]) -> Problem:
    if "question" in record:
        return _gsm8k_problem(record)
    if "problem" in record:
        return _math_problem(record)
    raise ValueError("has neither 'question' and 'answer' (GSM8K) nor 'problem' and 'solution' (MATH)")


def _gsm8k_problem(record: dict[str, Any]) -> Problem:
    question, solution = _text(record, "question").strip(), _text(record, "answer")
    working, mark, final = solution.rpartition("####")
    if not mark:
        raise ValueError("field 'answer' does not end in '#### N'")
    answer = parse_number(final)
    if answer is None:
        raise ValueError(f"field 'answer' ends in '####{final}', which is no number")
    if not question:
        raise ValueError("field 'question' is empty")
    working = re.sub(r"<<[^<>]*>>", "", working).strip()
    return Problem(question, f"{answer:f}", _key(question), working)


def _math_problem(record: dict[str, Any]) -> Problem:
    problem, answer = _text(record, "problem").strip(), record.get("answer")
    if not problem:
        raise ValueError("field 'problem' is empty")
    solution = None if answer is not None and "solution" not in record else _text(record, "solution")
    if answer is None:
        answers = boxed(solution or "")
        if not answers:
            raise ValueError("field 'solution' has no \\boxed{} answer")
        answer = answers[-1]
    return Problem(problem, str(answer), _key(problem), solution)


def _key(question: str) -> str:
    return " ".join(question.lower().split())


def boxed(text: str) -> list[str]:
    """What stands in the `\\boxed{…}` (`\\fbox{…}`, `\\boxed 7`) of a text, in order; unclosed ones are left out."""
    found = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*", text):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            bare = re.match(r"[^\s{}$]+", rest)
            found += [bare.group()] if bare else []
            continue
        depth = 0
        for place, character in enumerate(rest):
            escaped = place > 0 and rest[place - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                found.append(rest[1:place])
                break
    return found


class ReasoningGymSource:
    """Any task of the package reasoning-gym (arXiv:2505.24760), scored by the task's own checker.

    Only a full score counts: many checkers give partial credit for wrong answers, which a policy learns to collect.
    The tasks come without working, so every document is a guess-style one with the reference answer (an empty answer
    for the few tasks that have a checker but no reference): a base model learns the format from them, no strategy.

    The held-out problems are excluded by their question. Of a task with few different questions, at most half of those
    that were seen are held out, so that some are left to train on.
    """

    works_in_equations = False

    def __init__(self, cfg: ProblemConfig, seed: int):
        self._cfg, self._seed = cfg, seed
        self._create_dataset = _reasoning_gym_factory(cfg.task)
        self._checker = self._create_dataset(size=1, seed=0)
        seen: dict[str, Problem] = {}
        wanted, step = cfg.test_problems, 0
        while len(seen) < wanted:
            missing = wanted - len(seen)
            seen |= {problem.key: problem for problem in self._generate(missing, "held-out problems", step)}
            if len(seen) < wanted - missing // 2:  # mostly repetitions: the task has few different questions
                wanted = len(seen) // 2
            step += 1
        if not wanted:
            raise DataError(f"ProblemConfig.task = {cfg.task!r}: has one question only, so none can be held out")
        self.test = list(seen.values())[:wanted]
        self._held_out = {problem.key for problem in self.test}

    def sample(self, step: int, count: int, purpose: str) -> list[Problem]:
        problems: list[Problem] = []
        for attempt in range(100):
            fresh = self._generate(count - len(problems), purpose, step, attempt)
            problems += [problem for problem in fresh if problem.key not in self._held_out]
            if len(problems) == count:
                return problems
        raise DataError(
            f"reasoning_gym task {self._cfg.task!r} gave fewer than {count} problems that are not held out; lower"
            f" ProblemConfig.test_problems = {self._cfg.test_problems}"
        )

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        rng = random_generator(self._seed, f"{purpose} documents", step)
        num_bare = round(self._cfg.bare_fraction * count)
        bare_P = rng.permutation(count) < num_bare
        return [
            Document(problem.prompt, tagged_completion(None if bare else "", problem.answer), worked=False)
            for problem, bare in zip(self.sample(step, count, purpose), bare_P, strict=True)
        ]

    def is_correct(self, problem: Problem, answer: str) -> bool:
        try:
            score = self._checker.score_answer(answer, problem.entry)
        except Exception:  # several checkers raise whatever comes when the answer is malformed
            return False
        return score >= 1 - 1e-9

    def _generate(self, count: int, purpose: str, *indices: int) -> list[Problem]:
        rng = random_generator(self._seed, purpose, *indices)
        dataset = self._create_dataset(size=count, seed=int(rng.integers(2**31)))
        problems = []
        for index in range(count):
            entry = dataset[index]
            answer = "" if entry["answer"] is None else str(entry["answer"])
            problems.append(Problem(entry["question"], answer, key=entry["question"], entry=entry))
        return problems


def _reasoning_gym_factory(task: str) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            "ProblemConfig.source = 'reasoning_gym' needs the package reasoning-gym: pip install reasoning-gym"
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, list(DATASETS), n=3, cutoff=0)
        raise DataError(
            f"ProblemConfig.task = {task!r}: reasoning-gym has no such task; the nearest are {', '.join(near)}"
        )

    def create(size: int, seed: int) -> Any:
        return create_dataset(task, size=size, seed=seed)

    return create
