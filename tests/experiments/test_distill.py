"""Distillation, small: what the losses train, what the experiment reports, and that what is done is kept."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.distill import CONFIG, Config, Laboratory, same_tokens
from moe_jax.config import ConfigError, MeshConfig
from moe_jax.data.problems import Problem
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.model.definition import Definition
from moe_jax.presets import tiny_dense, tiny_moe
from moe_jax.rl.grpo import Rollout
from moe_jax.rl.teacher_samples import retokenized_documents
from moe_jax.sampling.sampler import Samples
from moe_jax.sharding import make_mesh
from moe_jax.training.distillation import make_distillation_loss, make_scorer
from moe_jax.training.supervised import make_totals

ROOT = Path(__file__).parents[2]
SMALL = """
    --mesh.data 1 --num-seeds 2 --checkpoint.every 2 --top-k 4
    --pretrain.steps 3 --pretrain.batch-size 8 --pretrain.optimizer.warmup-steps 1
    --teacher-pretrain.steps 3 --teacher-pretrain.batch-size 8 --teacher-pretrain.optimizer.warmup-steps 1
    --rl.steps 2 --rl.num-prompts 4 --rl.group-size 2 --rl.min-active-groups 0 --rl.optimizer.warmup-steps 1
    --distill.steps 4 --distill.batch-size 4 --distill.optimizer.warmup-steps 1
    --store-prompts 8 --store-shards 2 --data.test-problems 8 --evaluation.samples 2
    --model.hidden-size 32 --model.num-layers 1 --model.intermediate-size 32
    --teacher-model.hidden-size 32 --teacher-model.num-layers 2 --teacher-model.intermediate-size 32
"""


def run(run_dir, *more, code=0):
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.distill", "--run-dir", str(run_dir), *SMALL.split(), *more],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_the_table_has_every_method_and_a_part_that_is_missing_is_made_again_alike(tmp_path):
    methods = ["--methods", "logits", "on_policy", "rl"]
    printed = run(tmp_path / "run", *methods).stdout
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["students"]) == ["base", "logits", "on_policy", "rl"] and summary["seeds"] == [0, 1]
    table = (folder / "table.md").read_text()
    assert table in printed and "72.6" in printed and "47.0" in printed
    for name, entry in summary["students"].items():
        assert f"| {entry['title']} " in table and entry["pass_at_1"]["seeds"] == 2
        assert entry["student_flops"] > 0
        assert (entry["teacher_flops"] > 0) == (name in ("logits", "on_policy"))
    assert summary["students"]["logits"]["student_flops"] > summary["students"]["base"]["student_flops"]
    assert summary["teacher"]["training_flops"] > 0
    for plot in ("accuracy_and_compute", "accuracy_of_samples"):
        assert (folder / "plots" / f"{plot}.png").stat().st_size > 1000

    def losses(phase):
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if row["phase"] == phase]

    before = losses("logits-seed1")
    tokens = (folder / "teacher_samples" / "00001" / "tokens.npy").read_bytes()
    (folder / "evaluations" / "logits-seed1.json").unlink()
    for lost in (folder / "teacher_samples" / "00001", folder / "checkpoints" / "logits-seed1"):
        lost.rename(tmp_path / lost.name)
    done = run(folder, *methods)
    assert "evaluate logits-seed1" in done.stderr and "evaluate rl" not in done.stderr
    assert losses("logits-seed1") == before and len(before) == 4
    assert (folder / "teacher_samples" / "00001" / "tokens.npy").read_bytes() == tokens
    assert json.loads((folder / "summary.json").read_text())["students"] == summary["students"]


def test_the_divergence_trains_the_student_and_not_the_teacher():
    teacher_cfg = replace(tiny_moe(), hidden_size=32, num_layers=2, intermediate_size=32)
    student_cfg = replace(tiny_dense(), hidden_size=32, num_layers=1, intermediate_size=32)
    teacher, student = Definition.of(teacher_cfg), Definition.of(student_cfg)
    rng = np.random.default_rng(0)
    segments_BS = np.array([[1] * 6 + [0] * 2, [0] * 3 + [1] * 5], np.int32)
    batch = {
        "tokens_BS": jnp.asarray(rng.integers(0, 256, (2, 8)), jnp.int32),
        "segment_ids_BS": jnp.asarray(segments_BS),
        "positions_BS": jnp.asarray(np.maximum(np.cumsum(segments_BS, axis=1) - 1, 0), jnp.int32),
        "loss_mask_BS": jnp.asarray(segments_BS * (np.arange(8) >= 4)),
    }
    (t_params, t_rest), (params, rest) = teacher.init(jax.random.key(0)), student.init(jax.random.key(1))
    banned = (ByteTokenizer().pad_id,)
    score = make_scorer(teacher, 8, banned_ids=banned)
    loss, totals = make_distillation_loss(student, beta=1.0, banned_ids=banned), make_totals(student)

    @jax.jit
    def divergence(params, t_params, changed):
        top = score(t_params, t_rest, batch)
        scored = batch | {"teacher_ids_BSK": top.ids, "teacher_logprobs_BSJ": top.logprobs + changed}
        return loss(params, rest, scored, totals(params, rest, scored, 1)).loss

    gradient = jax.jit(jax.value_and_grad(divergence, argnums=(0, 1)))
    value, (to_student, to_teacher) = gradient(params, t_params, jnp.zeros((2, 8, 9)))
    assert value > 0
    assert all(np.max(np.abs(g)) > 0 for name, g in to_student.items() if "norm" not in name)
    assert all(np.all(np.asarray(g) == 0) for g in to_teacher.values())
    # Only what comes before a token that is to be learned counts: places 3 to 4 of the first row, 3 to 6 of the second.
    counted_BS = np.zeros((2, 8), bool)
    counted_BS[0, 3:5] = counted_BS[1, 3:7] = True
    noise = rng.normal(size=(2, 8, 9))
    assert divergence(params, t_params, jnp.asarray(np.where(counted_BS[..., None], 0, noise))) == value
    for place in zip(*np.nonzero(counted_BS), strict=True):
        changed = np.zeros((2, 8, 9))
        changed[place] = noise[place]
        assert divergence(params, t_params, jnp.asarray(changed)) != value


class OtherTokenizer(ByteTokenizer):
    @property
    def token_strings_V(self):
        return [*reversed(super().token_strings_V)]


def test_tokenizers_that_differ_leave_sequences_alone(tmp_path, monkeypatch):
    from moe_jax.data import tokenizer
    from moe_jax.training import start
    from moe_jax.training.experiment import Session

    assert same_tokens(ByteTokenizer(), ByteTokenizer()) and not same_tokens(ByteTokenizer(), OtherTokenizer())
    monkeypatch.setattr(start, "start_config", lambda init, run_dir: (tiny_moe(), "other"))
    real = tokenizer.load_tokenizer
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda name: OtherTokenizer() if name == "other" else real(name))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])

    class Folder:
        dir = tmp_path

    def laboratory(*methods):
        session = Session(Folder(), None, mesh)  # pyright: ignore[reportArgumentType]
        return Laboratory(replace(CONFIG, teacher="big", methods=methods), session)

    with pytest.raises(ConfigError, match=r"logits on_policy: the teacher big .*other.*byte.*sequences"):
        laboratory("logits", "sequences", "on_policy")
    assert laboratory("sequences", "rl").teacher_cfg == tiny_moe()


def test_a_teachers_text_in_the_students_tokens():
    samples = Samples(np.zeros((2, 3)), np.zeros((2, 3)), np.ones((2, 3), bool), np.array([True, False]))
    problem, nothing = Problem("1+2?", "3", "1+2?"), np.zeros((2, 1))
    texts, parts = ["<answer>3</answer>", "<answer>3"], [{"accuracy": 1.0}, {"accuracy": 0.0}]
    rollout = Rollout([problem], texts, nothing, nothing, samples, parts, np.zeros(2), {})  # pyright: ignore
    (document,) = retokenized_documents(rollout, [problem], ByteTokenizer(), 68)
    assert document.correct
    text = ByteTokenizer().decode(document.tokens_S.tolist())
    assert text.endswith("1+2?<answer>3</answer><eos>") and document.teacher_ids_SK.shape[1] == 0
    learned = document.tokens_S[document.loss_mask_S].tolist()
    assert ByteTokenizer().decode(learned) == "<answer>3</answer><eos>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 0}, "num_seeds = 0"),
        ({"methods": ("rl", "rl")}, "each once"),
        ({"store_prompts": 15}, "multiple of store_shards"),
        ({"distill": replace(CONFIG.distill, batch_size=48)}, "must divide the 256 samples"),
        ({"distill": replace(CONFIG.distill, sequence_length=60)}, "room for prompt_length"),
        ({"top_k": 0}, "top_k = 0"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"beta_on_policy": 1.5}, "beta_on_policy = 1.5"),
        ({"prompt": "Solve this"}, "must contain {problem}"),
    ],
)
def test_what_cannot_be_run_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Config(**change)
