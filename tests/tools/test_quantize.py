"""`python -m moe_jax quantize`: figures, the folder that it writes, what the other tools make of it, mistakes."""

import json

import jax.numpy as jnp
import pytest

from moe_jax.__main__ import main
from moe_jax.config import to_dict
from moe_jax.model.definition import Definition
from moe_jax.presets import tiny_moe
from moe_jax.rng import random_key
from moe_jax.training.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    params, rest = Definition.of(tiny_moe()).init(random_key(0, "weights"))
    (folder / "config.json").write_text(json.dumps({"experiment": "x", "config": {"model": to_dict(tiny_moe())}}))
    for phase, weights in (("base", params), ("broken", {**params, "norm.weight": params["norm.weight"] * jnp.nan})):
        with Checkpointer(folder / "checkpoints" / phase) as checkpoints:
            checkpoints.save(3, {"params": weights, "rest": rest}, {})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"{n} and {n + 1} make {2 * n + 1}. " * 400 for n in range(3)))
    return path


def quantize(run, text, out, *more: str) -> int:
    sizes = ["--data.path", str(text), "--batches", "1", "--batch-size", "2", "--sequence-length", "32"]
    return main(["quantize", "--run", str(run), "--phase", "base", "--out", str(out), *sizes, *more])


def test_a_run_in_four_bits_is_a_checkpoint_for_every_tool(run, text, tmp_path, capsys):
    assert quantize(run, text, tmp_path / "int4", "--bits", "int4") == 0
    assert "perplexity per token" in capsys.readouterr().out
    report = json.loads((tmp_path / "int4" / "quantization.json").read_text())
    before, after = report["before"], report["after"]
    assert report["rows"] == 2 and report["sequence_length"] == 32 and not report["activations"]
    assert 0 < abs(after["loss"] - before["loss"]) < 0.05 * before["loss"]
    assert after["bytes_on_disk"] < before["bytes_on_disk"] / 2
    assert after["bytes_in_memory"] < before["bytes_in_memory"] / 4

    checkpoint = ["--checkpoint", str(tmp_path / "int4")]
    assert main(["generate", *checkpoint, "--prompt", "1+", "--max-new-tokens", "3"]) == 0
    assert main(["convert", *checkpoint, "--run-dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    # What is rounded already rounds to itself, whose perplexity is the same.
    again = ["quantize", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--bits", "int4"]
    sizes = ["--data.path", str(text), "--batches", "1", "--batch-size", "2", "--sequence-length", "32"]
    assert main([*again, *sizes]) == 0
    second = json.loads((tmp_path / "again" / "quantization.json").read_text())
    assert second["before"]["loss"] == pytest.approx(after["loss"], rel=1e-4)
    assert second["after"]["loss"] == pytest.approx(after["loss"], rel=1e-4)


def test_a_broken_model_is_refused_with_the_tensor_s_name(run, text, tmp_path, capsys):
    arguments = ["quantize", "--run", str(run), "--phase", "broken", "--out", str(tmp_path / "m"), "--bits", "fp8"]
    arguments += ["--data.path", str(text), "--batches", "1", "--batch-size", "1", "--sequence-length", "16"]
    assert main(arguments) == 2
    assert "'model.norm.weight': NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_mistakes_get_one_line(run, text, tmp_path, capsys):
    assert main(["quantize", "--bits", "int8", "--out", str(tmp_path / "m")]) == 2
    assert "--run RUN_FOLDER, or --checkpoint" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert quantize(run, text, tmp_path / "full", "--bits", "int8") == 2
    assert "is there already" in capsys.readouterr().err
    assert quantize(run, text, tmp_path / "m", "--bits", "int4", "--block", "0") == 2
    assert "block = 0: must be at least 1" in capsys.readouterr().err
    assert quantize(run, text, tmp_path / "m", "--bits", "int4", "--sequence-length", "1") == 2
    assert "--sequence-length 1: must be at least 2" in capsys.readouterr().err
