"""Problems with answers that a rule can check, and the supervised text that a base model learns from.

Sources behind one interface: generated arithmetic, as sums and as stories, and the files of GSM8K (arXiv:2110.14168)
and MATH (arXiv:2103.03874) here; countdown, any task of the package reasoning-gym, and code beside it. Everything drawn
depends on nothing but (seed, purpose, step, count, level), so that a resumed run sees the problems of an uninterrupted
one, and nothing drawn is ever one of the held-out problems.

Shapes: P problems, N terms of the longest problem.
"""

from __future__ import annotations

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

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
    """What a checker needs beside the answer: reasoning_gym's entry; of code the function's name and tests."""
    chat: bool = False
    """Whether the prompt was written by a chat template, which begins it as the model expects: no <bos> is added."""


@dataclass(frozen=True)
class Document:
    """Supervised text: the completion carries its tags and ends in <eos>."""

    prompt: str
    completion: str
    worked: bool
    """Whether the completion shows the working (with or without mistakes)."""


class Levels(NamedTuple):
    """A curriculum: how many levels of difficulty, and what raises the level."""

    count: int = 1
    threshold: float = 1.0
    window: int = 1

    def after(self, accuracies: Iterable[float]) -> int:
        """The level, from 0, after steps of these mean accuracies.

        It rises by one, to the last at most, when the mean of the last `window` steps, all at the same level, is
        `threshold` or more.
        """
        level, recent = 0, []
        for accuracy in accuracies:
            recent = [*recent, accuracy][-self.window :]
            if len(recent) == self.window and sum(recent) >= self.threshold * self.window:
                level, recent = min(level + 1, self.count - 1), []
        return level


class ProblemSource(ABC):
    test: list[Problem]
    """The held-out problems: fixed for a seed, all different, in nothing that `sample` or `documents` return."""
    works_in_equations: bool = False
    """Whether the working consists of steps such as 7+1=8, so that a text without one is no working."""
    levels: Levels = Levels()

    @abstractmethod
    def sample(self, step: int, count: int, purpose: str, level: int = 0) -> list[Problem]:
        """`count` problems for a step of a phase; the same arguments give the same problems, always.

        `level` counts where the source has levels.
        """

    @abstractmethod
    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        """`count` documents, exactly round(worked_fraction · count) of them worked if the source has working."""

    @abstractmethod
    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Whether an answer is right; there is no partial credit."""

    def credits(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        """What answers are worth, from 0 to 1, which is a right one's and no other's.

        Between the two is what some sources have for an answer that is partly right. Taken together, since a source may
        judge several at a time.
        """
        return [float(self.is_correct(problem, answer)) for problem, answer in answers]


def load_problems(cfg: ProblemConfig, seed: int) -> ProblemSource:
    """The source that `cfg.source` names.

    Raises:
        DataError: a file that is missing or malformed (file and line are named), a package or task that is missing, a
            machine on which code cannot be confined.
    """
    from moe_jax.data.code_problems import CodeFileSource, GeneratedCodeSource
    from moe_jax.data.countdown import CountdownSource
    from moe_jax.data.reasoning_gym import ReasoningGymSource

    sources = {
        "arithmetic": ArithmeticSource,
        "words": StorySource,
        "gsm8k": GSM8KSource,
        "math": MathSource,
        "countdown": CountdownSource,
        "reasoning_gym": ReasoningGymSource,
        "code": CodeFileSource if cfg.path else GeneratedCodeSource,
    }
    return sources[cfg.source](cfg, seed)


def hold_out(wanted: int, draw: Callable[[int, int], list[Problem]]) -> list[Problem]:
    """`wanted` different problems of `draw(count, attempt)`; if there are few, half of those seen, so that some are
    left to train on."""
    seen: dict[str, Problem] = {}
    attempt = 0
    while len(seen) < wanted:
        missing = wanted - len(seen)
        seen |= {problem.key: problem for problem in draw(missing, attempt)}
        if len(seen) < wanted - missing // 2:  # mostly repetitions
            wanted = len(seen) // 2
        attempt += 1
    return list(seen.values())[:wanted]


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


def document_kinds(cfg: ProblemConfig, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` documents show the working, and which leave the think tags out: exact shares, random places."""
    num_worked = round(cfg.worked_fraction * count)
    num_bare = round(cfg.bare_fraction * (count - num_worked))
    place = rng.permutation(count)
    return place < num_worked, (place >= num_worked) & (place < num_worked + num_bare)


class ArithmeticSource(ProblemSource):
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

    def sample(self, step: int, count: int, purpose: str, level: int = 0) -> list[Problem]:
        rng = random_generator(self._seed, purpose, step)
        return self._problems(self._sample_terms(count, rng))

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        cfg, rng = self._cfg, random_generator(self._seed, purpose, step)
        terms_PN = self._sample_terms(count, rng)
        worked_P, bare_P = document_kinds(cfg, count, rng)
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
            documents.append(Document(self._write_prompt(terms), completion, bool(worked_P[row])))
        return documents

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return same_answer(answer, problem.answer)

    def _write_prompt(self, terms: list[int]) -> str:
        return "".join([f"{term:+d}" for term in terms])[1:] + "?"

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
            prompts = [self._write_prompt(terms) for terms in _term_lists(terms_PN)]
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
            prompt = self._write_prompt(terms)
            problems.append(Problem(prompt, str(chain[-1]), prompt, _write_chain(terms, chain[: len(terms)])))
        return problems


def _term_lists(terms_PN: np.ndarray) -> list[list[int]]:
    return [[term for term in row if term] for row in terms_PN.tolist()]


def _write_chain(terms: list[int], chain: list[int]) -> str:
    steps = [f"{term:+d}={value}" for term, value in zip(terms[1:], chain[1:], strict=True)]
    return str(terms[0]) + "".join(steps)


class StorySource(ArithmeticSource):
    """The same sums told as a story: `Ada has 7 pears. She finds 5. She loses 3. How many pears now?`

    The amount never falls below zero. Whose story it is and how each step is told depend on the terms alone, so that
    the same sum is always the same story, held out as a whole.
    """

    def _draw_terms(self, lengths_P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        terms_PN = super()._draw_terms(lengths_P, rng)
        for place in range(1, terms_PN.shape[1]):
            below_P = terms_PN[:, : place + 1].sum(axis=1) < 0
            terms_PN[below_P, place] *= -1
        return terms_PN

    def _write_prompt(self, terms: list[int]) -> str:
        wording = random.Random(repr(terms))
        name, pronoun = wording.choice(_PEOPLE)
        thing = wording.choice(_THINGS)
        steps = [f"{pronoun} {wording.choice(_GAINS if term > 0 else _LOSSES)} {abs(term)}." for term in terms[1:]]
        return " ".join([f"{name} has {terms[0]} {thing}.", *steps, f"How many {thing} now?"])


_PEOPLE = (("Ada", "She"), ("Ben", "He"), ("Eva", "She"), ("Max", "He"), ("Mia", "She"), ("Tom", "He"))
_THINGS = ("apples", "books", "coins", "pears", "shells", "stamps")
_GAINS = ("buys", "finds", "gets", "wins")
_LOSSES = ("drops", "gives away", "loses", "sells")


class FileSource(ProblemSource):
    """Problems from `train.jsonl` and `test.jsonl` in the folder `cfg.path`.

    All of `test.jsonl` is held out, and so is a training problem whose question, spaces and capitals aside, stands
    there too. Training goes through the problems in a new order each epoch.
    """

    def __init__(self, cfg: ProblemConfig, seed: int, read: Callable[[Path], list[Problem]]):
        self._cfg, self._seed = cfg, seed
        train_path, test_path = Path(cfg.path) / "train.jsonl", Path(cfg.path) / "test.jsonl"
        self.test = list({problem.key: problem for problem in read(test_path)}.values())
        held_out = {problem.key for problem in self.test}
        self._train = [problem for problem in read(train_path) if problem.key not in held_out]
        if not self._train:
            raise DataError(f"{train_path}: all of its problems are in {test_path} too: none is left to train on")

    def sample(self, step: int, count: int, purpose: str, level: int = 0) -> list[Problem]:
        size, orders = len(self._train), {}
        problems = []
        for position in range(step * count, (step + 1) * count):
            epoch, index = divmod(position, size)
            if epoch not in orders:
                orders[epoch] = random_generator(self._seed, f"{purpose} epoch", epoch).permutation(size)
            problems.append(self._train[orders[epoch][index]])
        return problems

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        """Worked documents are the reference solutions as they are, without deliberate mistakes."""
        rng = random_generator(self._seed, purpose, step)
        worked_P, bare_P = document_kinds(self._cfg, count, rng)
        noise_P = rng.normal(0, 1, count) * self._cfg.guess_std
        documents = []
        for row, problem in enumerate(self.sample(step, count, purpose)):
            if worked_P[row]:
                completion = tagged_completion(problem.worked or "", problem.answer)
            else:
                completion = tagged_completion(None if bare_P[row] else "", self._guess(problem, noise_P[row]))
            documents.append(Document(problem.prompt, completion, bool(worked_P[row])))
        return documents

    def _guess(self, problem: Problem, noise: float) -> str:
        """Another problem's answer; `noise`, normal of the standard deviation `guess_std`, says which."""
        return self._train[round(noise * 1e6) % len(self._train)].answer


class GSM8KSource(FileSource):
    """Grade-school word problems, as in the original release (arXiv:2110.14168).

    A record has the fields `question` and `answer`, whose last line is `#### N`; the calculator annotations
    (`<<48/2=24>>`) are taken out of the working. A guess is off by round(N(0, guess_std · √lines of the solution)).
    """

    def __init__(self, cfg: ProblemConfig, seed: int):
        super().__init__(cfg, seed, _read_gsm8k)

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return same_answer(answer, problem.answer)

    def _guess(self, problem: Problem, noise: float) -> str:
        lines = (problem.worked or "").count("\n") + 1
        return str(Decimal(problem.answer) + round(noise * lines**0.5))


class MathSource(FileSource):
    """Competition mathematics in the format of MATH (see `read_problems`); math-verify judges what is no plain number.

    An answer may stand in `\\boxed{}`. A guess is the answer of another problem.
    """

    def __init__(self, cfg: ProblemConfig, seed: int):
        from moe_jax.data.answers import Judge

        super().__init__(cfg, seed, read_problems)
        self._judge = Judge(problem.answer for problem in [*self.test, *self._train])

    def is_correct(self, problem: Problem, answer: str) -> bool:
        from moe_jax.data.answers import final_answer

        return self._judge(final_answer(tagged_completion(None, answer).removesuffix("<eos>")), problem.answer)


def _read_gsm8k(path: Path) -> list[Problem]:
    remedy = "ProblemConfig.path must name the folder with train.jsonl and test.jsonl of GSM8K's original release"
    return read_jsonl(path, _gsm8k_problem, remedy)


def read_problems(path: Path) -> list[Problem]:
    """The problems of a .jsonl file with one record a line, or of a .json file with one record.

    A record has GSM8K's fields, `question` and `answer` (ending in `#### N`), or those of MATH (arXiv:2103.03874),
    `problem` and `solution` (with the answer in its last `\\boxed{}`); a field `answer` beside `problem`, as MATH-500
    has it, goes before the solution. A MATH answer is LaTeX as it stands.

    Raises:
        DataError: a file that cannot be read, a record of neither format (file and line are named), no record at all.
    """
    remedy = "give a .jsonl file of problems, or a .json file with one"
    return read_jsonl(path, _any_problem, remedy, whole=path.suffix == ".json")


def read_jsonl(
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


def text_field(record: Mapping[str, Any], name: str) -> str:
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
    question, solution = text_field(record, "question").strip(), text_field(record, "answer")
    working, mark, final = solution.rpartition("####")
    if not mark:
        raise ValueError("field 'answer' does not end in '#### N'")
    answer = parse_number(final)
    if answer is None:
        raise ValueError(f"field 'answer' ends in '####{final}', which is no number")
    if not question:
        raise ValueError("field 'question' is empty")
    working = re.sub(r"<<[^<>]*>>", "", working).strip()
    return Problem(question, f"{answer:f}", question_key(question), working)


def _math_problem(record: dict[str, Any]) -> Problem:
    problem, answer = text_field(record, "problem").strip(), record.get("answer")
    if not problem:
        raise ValueError("field 'problem' is empty")
    solution = None if answer is not None and "solution" not in record else text_field(record, "solution")
    if answer is None:
        answers = boxed(solution or "")
        if not answers:
            raise ValueError("field 'solution' has no \\boxed{} answer")
        answer = answers[-1]
    return Problem(problem, str(answer), question_key(problem), solution)


def question_key(question: str) -> str:
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
