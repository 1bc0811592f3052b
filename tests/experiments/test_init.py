"""Experiments that start from a checkpoint: what comes from it, what is refused, and a resume that needs it no more."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RLConfig, SamplingConfig
from moe_jax.config import PolicyLossConfig as Loss
from moe_jax.data.tokenizer import HFTokenizer
from moe_jax.interop.byte_tokenizer import write_byte_tokenizer
from moe_jax.interop.pretrained import Pretrained, save_pretrained
from moe_jax.model.definition import Definition
from moe_jax.presets import tiny_moe

ROOT = Path(__file__).parents[2]
DENSE = ModelConfig(
    vocab_size=272,
    hidden_size=16,
    num_layers=1,
    intermediate_size=16,
    attention=AttentionConfig(kind="gqa", num_heads=2, num_kv_heads=2, head_dim=8),
    max_position=1024,
    initializer_range=0.3,
)
GRPO = """
    --mesh.data 1 --prompt-length 240 --data.test-problems 8 --rl.steps 2 --rl.num-prompts 2 --rl.group-size 2
    --rl.accumulation-steps 1 --rl.sampling.max-new-tokens 4 --evaluation.samples 2 --evaluation.batch-size 8
    --rl.reward.random --rl.min-active-groups 0
"""


def save(folder, cfg):
    tokenizer_folder = folder.with_name(f"{folder.name}-tokenizer")
    tokenizer_folder.mkdir()
    write_byte_tokenizer(tokenizer_folder)
    (tokenizer_folder / "chat_template.jinja").write_text("<|user|>{{ messages[0].content }}<|assistant|>")
    definition = Definition.of(cfg)
    params, rest = definition.init(jax.random.key(0))
    save_pretrained(Pretrained(definition, params, rest, HFTokenizer(tokenizer_folder)), folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint") / "dense", DENSE)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}


def experiment(environment, name, *arguments, ok=True):
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done.stdout if ok else done.stderr


@pytest.mark.slow
def test_grpo_on_a_checkpoint_asks_through_its_template_and_resumes_without_it(tmp_path, checkpoint, environment):
    init, run = tmp_path / "hf", tmp_path / "run"
    shutil.copytree(checkpoint, init)
    printed = experiment(environment, "grpo_math", "--init", init, "--run-dir", run, *GRPO.split())
    assert "Estimate:" in printed and "base model" in printed and "control" not in printed
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"evaluate_before", "grpo", "evaluate_grpo"}
    sample = json.loads((run / "rollouts/grpo/000001.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("<|user|>") and sample["prompt"].endswith("</answer>.<|assistant|>")
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["init"] == str(init) and config["model"]["hidden_size"] == 16 and not config["preset"]

    # Both the checkpoint and everything after the start are gone.
    shutil.rmtree(init)
    shutil.rmtree(run / "checkpoints" / "grpo")
    shutil.rmtree(run / "evaluations")
    (run / "metrics.jsonl").unlink()
    assert experiment(environment, "grpo_math", "--init", init, "--run-dir", run, *GRPO.split())
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for before, after in zip(rows, again, strict=True):
        assert {k: v for k, v in before.items() if "loss" in k or "pass" in k} == {
            k: v for k, v in after.items() if "loss" in k or "pass" in k
        }

    # A run is a start too.
    further = tmp_path / "further"
    experiment(environment, "grpo_math", "--init", run, "--run-dir", further, *GRPO.split())
    assert (further / "checkpoints" / "init").exists() and (further / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.slow
def test_pretraining_goes_on_from_a_checkpoint(tmp_path, checkpoint, environment):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i}: the quick brown fox. " * 20 for i in range(40)))
    small = "--mesh.data 1 --train.steps 2 --train.batch-size 2 --train.sequence-length 32 --train.optimizer.name adamw"
    arguments = ["--init", checkpoint, "--data.path", tmp_path / "text.txt", "--run-dir", tmp_path / "run"]
    printed = experiment(environment, "pretrain", *arguments, *small.split())
    assert "bits per byte" in printed
    assert (tmp_path / "run" / "checkpoints" / "init").exists()


@pytest.mark.slow
def test_balancing_is_compared_from_a_sparse_checkpoint(tmp_path, checkpoint, environment):
    sparse = replace(tiny_moe(), hidden_size=16, num_layers=2, mtp=MTPConfig(depth=0))
    sparse = replace(sparse, moe=replace(sparse.moe, num_experts=4, expert_size=8))
    folder = save(tmp_path / "sparse", sparse)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i}: the quick brown fox. " * 20 for i in range(40)))
    small = """--mesh.data 1 --train.steps 2 --train.batch-size 2 --train.sequence-length 32 --num-seeds 1
        --methods none bias --bias-update-rates 1e-3 --validation-batches 2"""
    arguments = ["--data.path", tmp_path / "text.txt", *small.split()]
    experiment(environment, "load_balancing", "--init", folder, "--run-dir", tmp_path / "run", *arguments)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = {row["phase"]: row["loss_main"] for row in rows if row["step"] == 1 and "loss_main" in row}
    assert len(first) == 2 and np.ptp(list(first.values())) == 0  # the same weights and batch
    refused = experiment(environment, "load_balancing", "--init", checkpoint, ok=False)
    assert "a dense model has no load to balance" in refused


@pytest.mark.slow
def test_r1_asks_a_checkpoint_through_the_papers_template_and_says_what_its_samples_lack(
    tmp_path, checkpoint, environment
):
    rl = """--{0}.steps 1 --{0}.num-prompts 2 --{0}.group-size 2 --{0}.num-minibatches 1 --{0}.accumulation-steps 1
        --{0}.sampling.max-new-tokens 4 --{0}.min-active-groups 0"""
    small = " ".join(rl.format(stage) for stage in ("zero", "language-rl", "final-rl"))
    small += "".join(f" --{stage}.train.sequence-length 64" for stage in ("cold-start", "rejection", "distillation"))
    small += (
        " --mesh.data 1 --prompt-length 500 --data.test-problems 8 --evaluation.samples 2 --cold-start.max-batches 1"
    )
    small += " --cold-start.samples 2"
    run = tmp_path / "run"
    arguments = ["--init", checkpoint, "--student", checkpoint, "--run-dir", run, *small.split()]
    refused = experiment(environment, "r1", *arguments, ok=False)
    assert "Traceback" not in refused
    assert "cold_start-seed0: of 1 batches of samples only 0 of 5000 are right and readable" in refused
    assert {path.stem for path in (run / "evaluations").iterdir()} == {"base-seed0", "zero-seed0"}
    sample = json.loads((run / "rollouts/zero-seed0/000001.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("A conversation between User and Assistant") and "readable" in sample


def test_what_the_checkpoint_decides_is_refused(tmp_path, checkpoint, environment):
    def mistake(*arguments):
        stderr = experiment(environment, "grpo_math", "--run-dir", tmp_path / "run", *arguments, ok=False)
        assert "Traceback" not in stderr and not (tmp_path / "run").exists()
        return stderr

    assert "--model.hidden-size = 32: the weights of" in mistake("--init", checkpoint, "--model.hidden-size", "32")
    assert "brings its own model" in mistake("--init", checkpoint, "--preset", "tiny_moe")
    assert "absent" in mistake("--init", tmp_path / "absent")
    assert "must contain {problem}" in mistake("--init", checkpoint, "--prompt", "solve it")


def test_the_estimate_grows_with_what_it_counts():
    from moe_jax.analysis.rl_cost import policy_step_cost

    rl = RLConfig(num_prompts=4, group_size=4, accumulation_steps=4, sampling=SamplingConfig(max_new_tokens=16))
    model = replace(DENSE, moe=MoEConfig(num_experts=0))
    cost = policy_step_cost(model, rl, prompt_length=16)
    weights = 4 * sum(variable.size for variable in map(np.empty, _shapes(model)))
    assert cost.state_bytes == 6 * weights
    with_reference = policy_step_cost(model, replace(rl, loss=Loss(beta=0.1)), 16)
    assert with_reference.state_bytes == 7 * weights and with_reference.update_flops * 3 == cost.update_flops * 4
    # Keys and values of 2 heads of 8, one layer, float32: 128 bytes for each of 32 tokens; and logits, twice.
    assert cost.sampling_bytes == 16 * (32 * 128 + 272 * 4 * 2) + 4 * 2 * 16**2 * 4
    halved = policy_step_cost(model, replace(rl, accumulation_steps=8), 16)
    assert halved.update_bytes * 2 == cost.update_bytes
    assert cost.seconds(float(cost.update_flops), float(cost.sampling_read_bytes)) == 2


def _shapes(model):
    return [variable.shape for variable in Definition.of(model).variables.values()]
