"""The command line: prompt in, text out; routing as tables and plots; and one clear line for what is wrong."""

import csv
import dataclasses
import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_jax.__main__ import main
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, to_dict
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.model.definition import Definition
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.state import TrainState

MODEL = ModelConfig(
    vocab_size=265,
    hidden_size=16,
    num_layers=1,
    intermediate_size=16,
    attention=AttentionConfig(kind="gqa", num_heads=2, num_kv_heads=2, head_dim=8),
    max_position=64,
)


def speaker(text: str) -> TrainState:
    """A model that says `text` after a "=" and stops; no character may come twice."""
    definition = Definition.of(MODEL)
    arrays = {name: np.zeros(v.shape, v.dtype) for name, v in definition.variables.items()}
    # Blocks of zeros pass the token's embedding on, and the head maps it to the next token.
    tokens = [*ByteTokenizer().encode(f"={text}"), ByteTokenizer().eos_id]
    arrays["norm.weight"][:] = 1
    arrays["embed_VD"][tokens[:-1], range(len(tokens) - 1)] = 1
    arrays["head_DV"][range(len(tokens) - 1), tokens[1:]] = 1
    params = {name: jnp.asarray(arrays.pop(name)) for name in definition.param_names}
    return TrainState(jnp.int32(7), params, jax.tree.map(jnp.asarray, arrays), (jnp.zeros(3),))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    (run / "config.json").write_text(json.dumps({"experiment": "grpo_math", "config": {"model": to_dict(MODEL)}}))
    phases = {"base": "no", "grpo": "<think>7é</think>ok", "random_reward": "xyz"}
    lines = [{"phase": phase, "step": 7, "elapsed": 1.0, "loss": 1.0} for phase in phases]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "ba')
    for phase, text in phases.items():
        with Checkpointer(run / "checkpoints" / phase) as checkpoints:
            checkpoints.save(7, speaker(text), {})
    return run


def generate(run, *args: str) -> int:
    return main(["generate", "--run", str(run), "--temperature", "0", "--max-new-tokens", "12", *args])


def test_completes_a_prompt_with_tags_as_text(run_dir, capsys):
    assert generate(run_dir, "--prompt", "1+1=") == 0
    captured = capsys.readouterr()
    assert captured.out == "<think>7é</think>ok\n"
    assert "grpo, step 7" in captured.err  # the last phase that is no control


def test_phase_and_lines_of_standard_input(run_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1=\n2="))
    assert generate(run_dir, "--phase", "base") == 0
    assert capsys.readouterr().out == "no\nno\n"


def test_asks_on_a_terminal_and_goes_on_after_a_mistake(run_dir, capsys, monkeypatch):
    answers = iter(["1=", "1" * 64, "2="])

    def ask(_: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", ask)
    assert generate(run_dir, "--phase", "base") == 0
    captured = capsys.readouterr()
    assert captured.out == "no\nno\n\n"
    assert "the prompt has 65 tokens" in captured.err


def refused(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_mistakes_get_one_line_and_exit_code_2(run_dir, tmp_path, capsys):
    assert generate(tmp_path / "absent", "--prompt", "x") == 2
    assert "absent is not the folder of a run" in refused(capsys)
    assert generate(tmp_path, "--prompt", "x") == 2
    assert "it has no config.json" in refused(capsys)
    (tmp_path / "config.json").write_text((run_dir / "config.json").read_text())
    assert generate(tmp_path, "--prompt", "x") == 2
    assert "has no checkpoint yet" in refused(capsys)
    (tmp_path / "config.json").write_text("{")
    assert generate(tmp_path, "--prompt", "x") == 2
    assert "cannot be read" in refused(capsys)

    assert generate(run_dir, "--phase", "grop", "--prompt", "x") == 2
    assert "no checkpoint of phase 'grop': use base or grpo or random_reward" in refused(capsys)
    assert generate(run_dir, "--top-p", "2", "--prompt", "x") == 2
    assert "SamplingConfig.top_p = 2.0" in refused(capsys)
    assert generate(run_dir, "--prompt", "1" * 64) == 2
    assert "the prompt has 65 tokens and the model's context 64" in refused(capsys)
    with pytest.raises(SystemExit) as exit:
        generate(run_dir, "--promt", "x")
    assert exit.value.code == 2


def test_a_config_that_does_not_fit_is_refused(run_dir, tmp_path, capsys):
    (tmp_path / "checkpoints").symlink_to(run_dir / "checkpoints")
    config = to_dict(MODEL) | {"hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "grpo_math", "config": {"model": config}}))
    assert generate(tmp_path, "--prompt", "x") == 2
    assert "is a checkpoint of another config" in refused(capsys)
    config["hidden_sise"] = 1
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "grpo_math", "config": {"model": config}}))
    assert generate(tmp_path, "--prompt", "x") == 2
    assert "did you mean 'hidden_size'?" in refused(capsys)


SPARSE = dataclasses.replace(
    MODEL, num_layers=3, moe=MoEConfig(num_experts=4, num_experts_per_token=2, expert_size=8, score="softmax")
)


def router_by_token(turn: int = 0) -> TrainState:
    """A model whose blocks add nothing, so that each token's embedding alone decides its experts in every layer.

    The digits use experts 0 and 1, everything else 2 and 3, all turned on by `turn`.
    """
    definition = Definition.of(SPARSE)
    arrays = {name: np.zeros(v.shape, v.dtype) for name, v in definition.variables.items()}
    for name in arrays:
        if "norm" in name:
            arrays[name][:] = 1
    arrays["embed_VD"][:, 1] = 1
    digits = ByteTokenizer().encode("0123456789")
    arrays["embed_VD"][digits, 0], arrays["embed_VD"][digits, 1] = 1, 0
    gate_DE = np.zeros((SPARSE.hidden_size, 4))
    gate_DE[:2] = np.roll([[3, 2, 1, 0], [0, 1, 2, 3]], turn, axis=1)
    arrays["moe_blocks.ffn.router.gate_DE"][:] = gate_DE
    params = {name: jnp.asarray(arrays.pop(name)) for name in definition.param_names}
    return TrainState(jnp.int32(7), params, jax.tree.map(jnp.asarray, arrays), (jnp.zeros(3),))


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("sparse")
    documents = [f"{n} words, and {n * n} more of them: {'12ab' * 40}" for n in range(200)]
    (run / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = {"model": to_dict(SPARSE), "train": {"sequence_length": 32}, "data": {"path": str(run / "corpus.jsonl")}}
    (run / "config.json").write_text(json.dumps({"experiment": "pretrain", "config": config}))
    with Checkpointer(run / "checkpoints" / "pretrain", keep=5) as checkpoints:
        for step, turn in [(3, 1), (5, 0), (7, 0)]:
            checkpoints.save(step, router_by_token(turn), {})
    return run


def table(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_inspect_routing(sparse_run, capsys):
    assert main(["inspect-routing", "--run", str(sparse_run), "--tokens", "200"]) == 0
    printed = capsys.readouterr().out
    assert "pretrain, step 7; held-out text of" in printed and "200 tokens" in printed
    folder = sparse_run / "routing"
    assert {path.name for path in folder.iterdir()} == {
        *("load.png", "coactivation.png", "coactivation_between_layers.png", "vocabulary.png", "specialisation.png"),
        *("layers.csv", "load.csv", "coactivation.csv", "vocabulary.csv", "summary.json"),
        *("saturation.png", "saturation.csv"),
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tokens"] == 200 and len(summary["layers"]) == 2
    for layer in summary["layers"]:
        assert layer["max_share"] == pytest.approx(0.5)
        assert layer["mutual_information"] > 0.5 and layer["dead_experts"] == 0
        assert layer["mutual_information"] + layer["mutual_information_shuffled"] <= np.log(2) + 1e-6
    shares = {int(row["step"]): float(row["share"]) for row in table(folder / "saturation.csv")}
    assert shares[3] == pytest.approx(0.5) and shares[5] == shares[7] == 1
    for row in table(folder / "vocabulary.csv"):
        assert row["token"].strip("'").isdigit() == (int(row["expert"]) < 2)
        assert row["share_of_occurrences"] == "1.0"
    pairs = {(row["expert"], row["other"]): row for row in table(folder / "coactivation.csv") if row["layer"] == "1"}
    assert pairs["0", "1"]["share_of_expert"] == "1.0" and pairs["0", "2"]["tokens"] == "0"


@pytest.fixture
def unrendered(monkeypatch):
    """Plots are made but not drawn, which takes seconds."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path: path.touch())


@pytest.mark.usefixtures("unrendered")
def test_inspect_routing_compares_texts(sparse_run, tmp_path, capsys):
    (tmp_path / "digits.md").write_text("2718281828" * 10)
    (tmp_path / "words.jsonl").write_text('{"text": "just words"}\n{"text": "nothing but words"}\n')
    texts = [str(tmp_path / "digits.md"), str(tmp_path / "words.jsonl")]
    assert main(["inspect-routing", "--run", str(sparse_run), "--text", *texts, "--out", str(tmp_path / "out")]) == 0
    assert "127 tokens" in capsys.readouterr().out  # 100 digits, 27 letters and spaces; special tokens do not count
    shares = {(row["text"], row["expert"]): row["share_of_tokens"] for row in table(tmp_path / "out" / "texts.csv")}
    assert shares["digits.md", "0"] == shares["digits.md", "1"] == shares["words.jsonl", "3"] == "1.0"
    assert shares["digits.md", "3"] == shares["words.jsonl", "0"] == "0.0"
    assert (tmp_path / "out" / "texts.png").exists()


@pytest.mark.usefixtures("unrendered")
def test_inspect_routing_of_a_single_checkpoint(sparse_run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((sparse_run / "config.json").read_text())
    (tmp_path / "checkpoints" / "pretrain").mkdir(parents=True)
    (tmp_path / "checkpoints" / "pretrain" / "00000005").symlink_to(
        sparse_run / "checkpoints" / "pretrain" / "00000005"
    )
    assert main(["inspect-routing", "--run", str(tmp_path), "--tokens", "100"]) == 0
    assert "only the checkpoint of step 5 is there" in capsys.readouterr().out
    assert not (tmp_path / "routing" / "saturation.csv").exists()


def test_inspect_routing_says_what_is_wrong(run_dir, sparse_run, tmp_path, capsys):
    def inspect(run, *args: str) -> int:
        return main(["inspect-routing", "--run", str(run), *args])

    assert inspect(run_dir) == 2
    assert "trained a dense model" in refused(capsys)
    assert inspect(sparse_run, "--phase", "grpo") == 2
    assert "no checkpoint of phase 'grpo'" in refused(capsys)
    assert inspect(sparse_run, "--tokens", "0") == 2
    assert "--tokens 0: must be at least 1" in refused(capsys)
    assert inspect(sparse_run, "--text", str(tmp_path / "absent.txt")) == 2
    assert "absent.txt does not exist" in refused(capsys)
    (tmp_path / "special.txt").write_text("<think>")
    assert inspect(sparse_run, "--text", str(tmp_path / "special.txt")) == 2
    assert "no token but special ones" in refused(capsys)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert inspect(sparse_run, "--text", str(tmp_path / "latin.txt")) == 2
    assert "is not UTF-8" in refused(capsys)


def test_help_is_quick():
    script = "import sys; from moe_jax.__main__ import main\ntry: main(['generate', '--help'])\n"
    script += "except SystemExit: assert 'jax' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--max-new-tokens" in result.stdout


def test_benchmark_takes_the_measured_routing_from_a_run(sparse_run, tmp_path, capsys, monkeypatch):
    from moe_jax.benchmarks import moe as benchmark

    asked = []

    def stop(config):
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "benchmark_moe", stop)
    assert main(["benchmark", "moe", "--run", str(sparse_run), "--plot", str(tmp_path / "a.png")]) == 130
    captured = capsys.readouterr()
    assert "pretrain, step 7" in captured.err
    few, few_too, many, many_too = asked[0].load_profile
    assert few == few_too < 1 < many == many_too  # digits and everything else, two experts each
    assert few + many == pytest.approx(2)
