"""`python -m moe_jax convert`: the model of a run as a Hugging Face folder, and a Hugging Face folder as a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_jax.config import MeshConfig, TextConfig, to_dict
from moe_jax.tools.model import ONE_DEVICE, ToolError, mendable

if TYPE_CHECKING:
    from moe_jax.interop.pretrained import Pretrained

_TEXT = TextConfig()


def convert(
    run: Path | None = None,
    out: Path | None = None,
    checkpoint: str | None = None,
    run_dir: Path | None = None,
    phase: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    upcycle_experts: int = 0,
    upcycle_experts_per_token: int = 2,
    merge_experts: int = 0,
    data: TextConfig = _TEXT,
    mesh: MeshConfig = ONE_DEVICE,
) -> None:
    """Converts a run's checkpoint to a Hugging Face folder (--run, --out), or the other way (--checkpoint, --run-dir).

    A Hugging Face folder gets config.json, the weights as safetensors, and the tokenizer; the byte-level tokenizer is
    written as a tokenizer.json with the same ids. A run folder gets the weights as its phase `init`, the tokenizer and
    config.json: `generate`, `evaluate` and `inspect-routing` take it, and experiments with --init.

    Args:
        run: The folder of a run, finished or in progress.
        out: The Hugging Face folder to write; must not exist yet, or be empty.
        checkpoint: A Hugging Face folder, or the name of a repository.
        run_dir: The run folder to write; must not exist yet.
        phase: Whose checkpoint of the run: base, grpo, ... By default the phase trained last, controls aside.
        dtype: Of the written tensors, with --out; by default that of the model's arithmetic, as is usual.
        upcycle_experts: With --run-dir, of a dense model: so many copies of each feed-forward as experts, with a new
            router; the logits are the same (sparse upcycling, arXiv:2212.05055). 0: the model as it is.
        upcycle_experts_per_token: Of the upcycled model.
        merge_experts: With --run-dir, of a sparse model: a dense one, whose feed-forwards are the shared experts and so
            many of the routed ones that were given most tokens. A start for a student, not the same model.
        data: With --merge-experts: the text whose tokens are counted; by default the Python standard library's.
        mesh: Devices that a large model is spread over.
    """
    if run is not None and out is not None and checkpoint is None and run_dir is None:
        if upcycle_experts or merge_experts:
            raise ToolError("--upcycle-experts and --merge-experts: are for --checkpoint and --run-dir")
        _export(run, out, phase, dtype, mesh)
    elif checkpoint is not None and run_dir is not None and run is None and out is None:
        if phase is not None or dtype is not None:
            raise ToolError("--phase and --dtype: are for --run; a run folder holds float32 weights in a phase `init`")
        if upcycle_experts and merge_experts:
            raise ToolError("give one of --upcycle-experts and --merge-experts")
        _import(checkpoint, run_dir, mesh, upcycle_experts, upcycle_experts_per_token, merge_experts, data)
    else:
        raise ToolError("give --run RUN_FOLDER --out HUGGING_FACE_FOLDER, or --checkpoint FOLDER --run-dir RUN_FOLDER")


def _export(run: Path, out: Path, phase: str | None, dtype: str | None, mesh: MeshConfig) -> None:
    from moe_jax.interop.pretrained import save_pretrained

    with mendable(), exportable(run, phase, mesh) as (title, model):
        save_pretrained(model, out, dtype=dtype)
    print(f"{title} → {out} ({dtype or model.config.dtype} tensors)")


@contextmanager
def exportable(run: Path, phase: str | None, mesh: MeshConfig) -> Iterator[tuple[str, Pretrained]]:
    """What a run's model is called, and itself, with a tokenizer that has files as long as this lasts."""
    from moe_jax.data.tokenizer import HFTokenizer
    from moe_jax.interop.byte_tokenizer import write_byte_tokenizer
    from moe_jax.interop.pretrained import Pretrained
    from moe_jax.sharding import make_mesh
    from moe_jax.training.weights import newest_phase, restore_weights, run_definition, run_tokenizer

    config, definition = run_definition(run)
    phase = newest_phase(run, phase)
    tokenizer = run_tokenizer(run, config, definition.cfg.vocab_size)
    weights = restore_weights(run, definition, phase, make_mesh(mesh))
    with tempfile.TemporaryDirectory() as temporary:
        if not isinstance(tokenizer, HFTokenizer):
            write_byte_tokenizer(Path(temporary))
            tokenizer = HFTokenizer(temporary)
        generation_file = tokenizer.file.parent / "generation_config.json"
        # A model that was trained here is drawn from; without this word checkpoints are greedy.
        generation: dict[str, Any] = {"do_sample": True, "eos_token_id": tokenizer.eos_id}
        if tokenizer.bos_id is not None:
            generation["bos_token_id"] = tokenizer.bos_id
        if generation_file.is_file():
            generation = json.loads(generation_file.read_text(encoding="utf-8"))
        model = Pretrained(definition, weights.params, weights.rest, tokenizer, generation)
        yield f"{run}: {phase}, step {weights.step}", model


def _import(
    checkpoint: str,
    run_dir: Path,
    mesh: MeshConfig,
    experts: int,
    experts_per_token: int,
    merged: int,
    text: TextConfig,
) -> None:
    from moe_jax.interop.pretrained import load_pretrained
    from moe_jax.model.definition import Definition
    from moe_jax.rng import random_key
    from moe_jax.sharding import make_mesh
    from moe_jax.training.expert_merging import merge_experts, merged_config
    from moe_jax.training.run import Run
    from moe_jax.training.start import INIT_PHASE, keep_tokenizer, start_config, start_weights
    from moe_jax.training.upcycling import upcycle, upcycled_config

    if run_dir.exists() and any(run_dir.iterdir()):
        raise ToolError(f"--run-dir {run_dir}: is there already; name another folder")
    with mendable():
        placed = make_mesh(mesh)
        model, tokenizer = start_config(checkpoint, run_dir)
        changed = upcycled_config(model, experts, experts_per_token) if experts else model
        changed = merged_config(model, merged) if merged else changed
        config = {"seed": 0, "init": checkpoint, "tokenizer": tokenizer, "model": to_dict(changed)}
        with Run.open(run_dir, "convert", config) as run:
            keep_tokenizer(run.dir, tokenizer)
            if changed is model:
                start_weights(run, checkpoint, Definition.of(model), placed)
            else:
                loaded, definition, rest = load_pretrained(checkpoint, placed), Definition.of(changed), {}
                if experts:
                    key = random_key(0, "upcycling")
                    params, rest = upcycle(loaded.definition, loaded.params, definition, key, placed)
                else:
                    params = merge_experts(loaded.definition, loaded.params, _load(loaded, text), merged, definition)
                with run.checkpointer(INIT_PHASE, keep=1) as checkpoints:
                    checkpoints.save(0, {"params": params, "rest": rest}, {"init": checkpoint})
    what = f", {experts} experts" if experts else f", {merged} experts merged" if merged else ""
    print(f"{checkpoint} → {run_dir} (phase init{what})")


def _load(model: Pretrained, text: TextConfig) -> Any:
    """Tokens that each expert is given, of 16 batches."""
    from moe_jax.data.text import TextCorpus, spread_validation_batches
    from moe_jax.training.expert_merging import expert_load

    assert model.tokenizer is not None
    length = min(512, model.config.max_position)
    batches = spread_validation_batches(TextCorpus.load(text.path), model.tokenizer, 8, length, 16)
    return expert_load(model.definition, model.params, model.rest, batches)
