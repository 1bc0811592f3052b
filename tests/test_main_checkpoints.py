"""Tools on Hugging Face folders: chats, scores, conversions to a run and back."""

import io
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from moe_jax.__main__ import main
from moe_jax.analysis.evaluation_statistics import figures
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, RoPEConfig, to_dict
from moe_jax.data.problem_files import problem_files
from moe_jax.data.tokenizer import HFTokenizer, byte_characters
from moe_jax.interop.pretrained import Pretrained, load_pretrained, save_pretrained
from moe_jax.model.definition import Definition
from moe_jax.presets import tiny_moe
from moe_jax.rng import random_key
from moe_jax.tools.evaluation_records import batches
from moe_jax.tools.generate import sampling_config
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.start import keep_tokenizer

MODEL = ModelConfig(
    vocab_size=264,
    hidden_size=32,
    num_layers=1,
    intermediate_size=16,
    attention=AttentionConfig(
        kind="gqa", num_heads=2, num_kv_heads=2, head_dim=16, qkv_bias=True, rope=RoPEConfig(theta=1e6)
    ),
    max_position=256,
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<pad>", "<eos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


def write_tokenizer(folder, template: str | None):
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    vocabulary |= {character: len(SPECIAL) + byte for character, byte in byte_characters().items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "pad_token": "<pad>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return HFTokenizer(folder)


def save_speaker(folder, text: str, start: str, template: str | None = TEMPLATE, generation=None):
    """A checkpoint of a model that says `text` after `start` and stops; no character may come twice."""
    tokenizer = write_tokenizer(folder.with_name(f"{folder.name}-tokenizer"), template)
    definition = Definition.of(MODEL)
    arrays = {name: np.zeros(v.shape, v.dtype) for name, v in definition.variables.items()}
    tokens = [*tokenizer.encode(start + text), tokenizer.eos_id]
    arrays["norm.weight"][:] = 1
    arrays["embed_VD"][tokens[:-1], range(len(tokens) - 1)] = 1
    arrays["head_DV"][range(len(tokens) - 1), tokens[1:]] = 1
    params = {name: jnp.asarray(arrays.pop(name)) for name in definition.param_names}
    save_pretrained(Pretrained(definition, params, {}, tokenizer, generation or {}), folder)
    return folder


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatty") / "model"
    return save_speaker(folder, "hi!", "<|assistant|>", generation={"do_sample": False, "max_new_tokens": 9})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Answers every question with 7."""
    return save_speaker(tmp_path_factory.mktemp("plain") / "model", "\\boxed{7}", ":", template=None)


def generate(checkpoint, *args: str) -> int:
    return main(["generate", "--checkpoint", str(checkpoint), *args])


def test_a_checkpoint_chats_through_its_template(chatty, capsys, monkeypatch):
    assert generate(chatty, "--prompt", "hello") == 0
    captured = capsys.readouterr()
    assert captured.out == "hi!\n"
    assert "chat, temperature 0, at most 9 new tokens" in captured.err  # what its generation_config.json says

    asked = []
    template = HFTokenizer.apply_chat_template

    def seen(self, messages, *more):
        asked.append([(m["role"], m["content"]) for m in messages])
        return template(self, messages, *more)

    answers = iter(["one", "two", "/new", "three"])

    def ask(_: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(HFTokenizer, "apply_chat_template", seen)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", ask)
    assert generate(chatty, "--system", "be brief") == 0
    assert capsys.readouterr().out == "hi!\nhi!\nhi!\n\n"
    system = ("system", "be brief")
    assert asked == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", "hi!"), ("user", "two")],
        [system, ("user", "three")],
    ]


def test_lines_of_standard_input_are_conversations_of_their_own(chatty, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    assert generate(chatty) == 0
    assert capsys.readouterr().out == "hi!\nhi!\n"


def test_raw_and_templateless_checkpoints_complete(chatty, plain, capsys):
    assert generate(chatty, "--raw", "--prompt", "say: <|assistant|>") == 0
    assert capsys.readouterr().out == "hi!\n"
    assert generate(plain, "--temperature", "0", "--prompt", "Answer:") == 0
    assert capsys.readouterr().out == "\\boxed{7}\n"


def test_generation_config_gives_the_defaults_and_flags_go_before_them():
    none = dict.fromkeys(("max_new_tokens", "temperature", "top_k", "top_p", "min_p"))
    stated = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1}
    found = sampling_config(stated, none, chat=True)
    assert (found.temperature, found.top_p, found.top_k, found.max_new_tokens) == (0.6, 0.95, 0, 1024)
    assert sampling_config(stated, none | {"temperature": 0.0}, chat=True).temperature == 0
    # As in transformers: greedy unless do_sample says otherwise, whatever else is stated.
    for config in (
        {"do_sample": False, "temperature": 0.6},
        {"temperature": 0.6, "top_p": 0.9},
        {"eos_token_id": 1},
        {},
    ):
        greedy = sampling_config(config, none, chat=False)
        assert (greedy.temperature, greedy.top_p, greedy.max_new_tokens) == (0, 1, 256)
    assert sampling_config({"max_new_tokens": 9}, none, chat=False).max_new_tokens == 9
    # Who asks for draws gets them, with what else is stated.
    drawn = sampling_config({"temperature": 0.6}, none | {"top_p": 0.9}, chat=False)
    assert (drawn.temperature, drawn.top_p) == (0.6, 0.9)
    assert sampling_config({}, none | {"top_k": 5}, chat=False).temperature == 1
    assert sampling_config(None, none, chat=False).temperature == 1  # trained here
    with pytest.raises(ConfigError, match=r"generation_config.json: temperature = 'hot': must be a number"):
        sampling_config({"do_sample": True, "temperature": "hot"}, none, chat=False)


def refused(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_mistakes_get_one_line(chatty, plain, tmp_path, capsys):
    assert generate(chatty, "--run", str(tmp_path), "--prompt", "x") == 2
    assert "--run RUN_FOLDER, or --checkpoint" in refused(capsys)
    assert generate(chatty, "--phase", "grpo") == 2
    assert "--phase grpo: is for --run" in refused(capsys)
    assert generate(plain, "--system", "x", "--prompt", "x") == 2
    assert "--system: this model has no chat template" in refused(capsys)
    assert generate(tmp_path / "absent", "--prompt", "x") == 2
    assert "absent" in refused(capsys)
    assert main(["convert", "--run", str(tmp_path)]) == 2
    assert "--run RUN_FOLDER --out" in refused(capsys)
    assert main(["evaluate", "--checkpoint", str(plain), "--data", str(tmp_path)]) == 2
    assert "has no .jsonl or .json file" in refused(capsys)
    more = ["--data", str(tmp_path), "--temperature", "0"]
    assert main(["evaluate", "--checkpoint", str(plain), *more]) == 2
    assert "--samples 8: at temperature 0 all samples are the same" in refused(capsys)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    gsm8k = [{"question": f"What is {n}?", "answer": f"It is <<{n}={n}>>{n}.\n#### {n}"} for n in (7, 8, 7)]
    math = [{"problem": "Seven?", "solution": r"So $\boxed{7.0}$."}]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(record) + "\n" for record in gsm8k))
    (folder / "math.jsonl").write_text("".join(json.dumps(record) + "\n" for record in math))
    return folder


def evaluate(plain, problems, out, *more: str) -> int:
    arguments = ["--samples", "2", "--batch-size", "4", "--max-new-tokens", "12", "--top-k", "1", *more]
    return main(["evaluate", "--checkpoint", str(plain), "--data", str(problems), "--out", str(out), *arguments])


def test_evaluate_scores_both_formats(plain, problems, tmp_path, capsys):
    assert evaluate(plain, problems, tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] and summary["problems"] == 4
    for figure in ("pass_at_1", "pass_at_2", "cons_at_2"):
        assert summary[figure]["mean"] == 0.75 and summary[figure]["low"] < 0.75 < summary[figure]["high"]
    assert summary["pass_at_1_by_file"]["math.jsonl"]["mean"] == 1
    assert summary["answered"] == 1 and summary["cut_off"] == 0 and summary["mean_tokens"] == 10
    assert summary["settings"]["prompt"].startswith("Question: {problem}")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["completion"] for row in rows} == {"\\boxed{7}"}
    printed = capsys.readouterr().out
    assert "pass@1" in printed and "cons@2" in printed and "0.750" in printed


def test_an_interrupted_evaluation_goes_on_where_it_stopped(plain, problems, tmp_path, capsys, monkeypatch):
    from moe_jax.rl import grpo

    make_generator, calls = grpo.make_generator, []

    def interrupted(*args):
        sample = make_generator(*args)

        def run(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return sample(*arguments)

        return run

    monkeypatch.setattr(grpo, "make_generator", interrupted)
    assert evaluate(plain, problems, tmp_path) == 130
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["complete"] and summary["problems"] == 2
    first = (tmp_path / "samples.jsonl").read_text()
    (tmp_path / "samples.jsonl").write_text(first + first.splitlines()[0].replace('"batch": 0', '"batch": 1')[:-9])
    assert evaluate(plain, problems, tmp_path) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["problems"] == 4
    assert len(calls) == 3 and (tmp_path / "samples.jsonl").read_text().startswith(first)
    capsys.readouterr()
    assert evaluate(plain, problems, tmp_path, "--seed", "1") == 2
    assert "has an evaluation with another" in refused(capsys)


def test_samples_of_other_weights_are_not_taken_up(problems, tmp_path, capsys):
    folder = save_speaker(tmp_path / "model", "\\boxed{7}", ":", template=None)
    assert evaluate(folder, problems, tmp_path / "out", "--limit", "1") == 0
    shutil.rmtree(folder)
    save_speaker(folder, "\\boxed{8}", ":", template=None)
    capsys.readouterr()
    assert evaluate(folder, problems, tmp_path / "out", "--limit", "1") == 2
    assert "has an evaluation with another weights" in refused(capsys)


def test_batches_are_bounded_and_hold_every_sample_once():
    for problems, samples, batch_size in [(5, 8, 16), (3, 8, 3), (2, 7, 4), (4, 1, 3)]:
        G, parts = batches(problems, samples, batch_size)
        assert all(len(part) * G <= batch_size for part in parts)
        drawn = [(problem, first + i) for part in parts for problem, first in part for i in range(G)]
        assert sorted(drawn) == [(problem, sample) for problem in range(problems) for sample in range(samples)]


def test_figures_are_unbiased_and_of_whole_problems_alone():
    def row(problem, sample, answer):
        return {
            "problem": problem,
            "sample": sample,
            "answer": answer,
            "correct": answer in ("7", "7.0"),
            "tokens": 4,
            "cut_off": False,
        }

    rows = [row(0, i, answer) for i, answer in enumerate(["7", "8", "7.0", None])]
    rows += [row(1, i, answer) for i, answer in enumerate(["8", "8", "7", "9"])] + [row(2, 0, "7")]
    found = figures(rows, ["a", "a", "a"], samples=4)
    assert found["problems"] == 2
    assert found["pass_at_1"]["mean"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert found["pass_at_2"]["mean"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2)
    assert found["pass_at_4"]["mean"] == 1 and found["cons_at_4"]["mean"] == 0.5
    assert found["answered"] == pytest.approx(7 / 8)


def test_of_a_folder_its_test_file_is_taken(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).touch()
    assert problem_files(tmp_path) == [tmp_path / "test.jsonl"]


def test_a_run_becomes_a_checkpoint_and_a_run_again_bit_for_bit(tmp_path, capsys):
    cfg = tiny_moe()
    definition = Definition.of(cfg)
    params, rest = definition.init(random_key(0, "weights"))
    rest = {name: value + 0.25 for name, value in rest.items()}
    run, out, back = tmp_path / "run", tmp_path / "hf", tmp_path / "back"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"experiment": "grpo_math", "config": {"model": to_dict(cfg)}}))
    with Checkpointer(run / "checkpoints" / "grpo") as checkpoints:
        checkpoints.save(3, {"params": params, "rest": rest}, {})
    assert main(["convert", "--run", str(run), "--out", str(out)]) == 0
    loaded = load_pretrained(out)
    assert loaded.tokenizer is not None and loaded.tokenizer.encode("<think>7") == [3, 9 + ord("7")]
    for name, value in {**params, **rest}.items():
        assert np.array_equal({**loaded.params, **loaded.rest}[name], value), name

    assert main(["convert", "--checkpoint", str(out), "--run-dir", str(back)]) == 0
    assert main(["convert", "--run", str(back), "--out", str(tmp_path / "again")]) == 0
    first, again = (
        {file.name: file.read_bytes() for file in folder.glob("*") if file.suffix == ".safetensors"}
        for folder in (out, tmp_path / "again")
    )
    assert first and first == again
    assert HFTokenizer(tmp_path / "again").vocab_size == 265
    capsys.readouterr()
    assert main(["generate", "--run", str(back), "--prompt", "1+", "--max-new-tokens", "2"]) == 0
    assert "init, step 0" in capsys.readouterr().err
    assert main(["convert", "--checkpoint", str(out), "--run-dir", str(back)]) == 2
    assert "is there already" in refused(capsys)


def test_a_run_keeps_a_tiktoken_tokenizer(tmp_path):
    """By its folder or its file; the copy alone is then enough."""
    source = Path(__file__).with_name("data") / "tiktoken"
    for name in (source, source / "tiktoken.model"):
        run = tmp_path / name.name
        kept = keep_tokenizer(run, str(name))
        assert keep_tokenizer(run, "moved away").encode("专家 [EOS]") == kept.encode("专家 [EOS]")
        assert not list(run.rglob("tokenizer.json"))
