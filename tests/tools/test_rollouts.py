"""`python -m moe_jax rollouts`: samples in order, readable, and harmless whatever they contain."""

import html.parser
import json
import os
import re

import pytest

from moe_jax.__main__ import main
from moe_jax.tools.rollouts import terminal_sample, visible

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)> \x1b[2J\x07 \"' &lt; \u202e end"


def sample(number: int, **changes) -> dict:
    return {
        "step": 1,
        "prompt": f"{number}+1?",
        "answer": str(number + 1),
        "completion": f"<think>{number}</think><answer>{number}</answer>",
        "reward": number / 10,
        "accuracy": float(number % 2),
        "format": 1.0,
        "language": None,
        "advantage": (number * 7 % 5) - 2.0,
        "tokens": 20 - number,
        "finished": number != 3,
    } | changes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    for phase, steps in (("grpo", range(1, 31)), ("random_reward", (1,))):
        folder = run / "rollouts" / phase
        folder.mkdir(parents=True)
        for step in steps:
            rows = [sample(number, step=step) for number in range(12)]
            rows[5]["completion"] = HOSTILE
            (folder / f"{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.utime(folder / f"{step:06d}.jsonl", (1000 + step + 100 * (phase == "grpo"),) * 2)
    return run


def numbers(text: str, field: str) -> list[float]:
    return [float(value) for value in re.findall(rf"\b{field} (-?[\d.]+)", text)]


@pytest.mark.parametrize(
    ("flags", "field", "expected"),
    [
        ((), "reward", [1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        (("--reverse", "--limit", "3"), "reward", [0.0, 0.1, 0.2]),
        (("--sort", "advantage", "--limit", "3"), "advantage", [2.0, 2.0, 1.0]),
        (("--sort", "length", "--limit", "0"), "tokens", [20.0 - number for number in range(12)]),
    ],
)
def test_samples_of_the_last_step_are_sorted(run, capsys, flags, field, expected):
    assert main(["rollouts", "--run", str(run), *flags]) == 0
    text = capsys.readouterr().out
    assert "grpo, step 30;" in text and "\x1b" not in text  # no terminal: no colour, and none of the samples' codes
    assert numbers(text, field) == expected


def test_a_sample_is_wrapped_and_says_all_there_is():
    text = terminal_sample(sample(3, completion="word " * 60 + "\nlast\tline"), 1, 60, colour=False)
    assert max(map(len, text.split("\n"))) <= 60 and text.count("word") == 60
    assert re.search(r"last +line", text) and "language -" in text and "cut off" in text and "3+1?" in text
    assert "\x1b[32m" in terminal_sample(sample(3, advantage=1.0), 1, 60, colour=True)


def test_control_characters_are_shown_not_obeyed():
    assert visible("a\x1b[31m\r\x00\nb\té") == "a\\x1b[31m\\r\\x00\nb\té"
    assert visible("\u202e\ud800") == "\\u202e\\ud800"


class Page(html.parser.HTMLParser):
    """The elements of a page, the data of its samples, and the text of each `pre`."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.articles: list[dict] = []
        self.texts: list[str] = []
        self.urls: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value for name, value in attrs if name in ("src", "href", "action") or name.startswith("on")]
        if tag == "article":
            self.articles.append(dict(attrs))
        if tag == "pre":
            self.texts.append("")
        self._inside = tag == "pre"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.texts[-1] += data


def test_the_page_is_whole_and_escaped(run, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert main(["rollouts", "--run", str(run), "--html", str(file)]) == 0
    assert "120 samples of grpo, steps 1, 4, 7," in capsys.readouterr().out
    page = Page(file.read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1 and "img" not in page.tags and not page.urls
    assert len(page.articles) == 120 and {article["data-kind"] for article in page.articles} == {"right", "wrong"}
    assert sorted({int(article["data-step"]) for article in page.articles})[-1] == 30
    assert page.texts.count(visible(HOSTILE)) == 10
    assert "default-src 'none'" in file.read_text()


def test_steps_and_phase_can_be_named(run, tmp_path, capsys):
    file = tmp_path / "page.html"
    flags = ["--step", "2", "7", "--limit", "4", "--sort", "length", "--reverse"]
    assert main(["rollouts", "--run", str(run), *flags, "--html", str(file)]) == 0
    articles = Page(file.read_text()).articles
    assert [int(article["data-step"]) for article in articles] == [2] * 4 + [7] * 4
    assert [float(article["data-tokens"]) for article in articles[:4]] == [9, 10, 11, 12]
    capsys.readouterr()
    assert main(["rollouts", "--run", str(run), "--phase", "random_reward"]) == 0
    assert "random_reward, step 1;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--step", "99"), r"--step 99: .*it has 30, from 1 to 30"),
        (("--phase", "base"), r"--phase base: .*it has grpo, random_reward"),
        (("--limit", "-1"), r"--limit -1: must be 0"),
        (("--html", "/nowhere/page.html"), r"cannot write /nowhere/page.html"),
    ],
)
def test_mistakes_are_named(run, capsys, flags, message):
    assert main(["rollouts", "--run", str(run), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_folders_without_rollouts_and_damaged_files(tmp_path, capsys):
    assert main(["rollouts", "--run", str(tmp_path)]) == 2
    assert "has no rollouts" in capsys.readouterr().err
    folder = tmp_path / "rollouts" / "grpo"
    folder.mkdir(parents=True)
    for line, message in (
        ("{", "line 2 is not a sample"),
        ('{"prompt": "x"}', "it has no completion"),
        ("7", "line 2"),
    ):
        (folder / "000001.jsonl").write_text(json.dumps(sample(1)) + "\n" + line + "\n")
        assert main(["rollouts", "--run", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
