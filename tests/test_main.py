"""The command line: prompt in, text out, and one clear line for what is wrong."""

import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.__main__ import main
from moe_jax.config import AttentionConfig, ModelConfig, to_dict
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


def test_help_is_quick():
    script = "import sys; from moe_jax.__main__ import main\ntry: main(['generate', '--help'])\n"
    script += "except SystemExit: assert 'jax' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--max-new-tokens" in result.stdout
