"""Starting from weights that are there: `--init`, a Hugging Face checkpoint or the folder of another run.

A run that starts so keeps the weights as its phase "init" and a copy of the tokenizer, and its config.json says what
they came from: from then on it needs nothing outside its folder.
"""

from __future__ import annotations

import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax.config import ConfigError, ModelConfig, from_dict
from moe_jax.data import DataError
from moe_jax.data.tiktoken_files import TIKTOKEN_FILE
from moe_jax.data.tokenizer import HFTokenizer, Tokenizer, load_tokenizer, tokenizer_file
from moe_jax.interop.pretrained import TOKENIZER_FILES, load_pretrained, read_config
from moe_jax.model.definition import Arrays, Definition
from moe_jax.training.run import Run, RunError, load_config
from moe_jax.training.weights import (
    TOKENIZER_FOLDER,
    abstract_weights,
    newest_phase,
    restore_weights,
    run_definition,
)

INIT_PHASE = "init"

_TRAINING_FIELDS = {
    "max_position",
    "initializer_range",
    "dtype",
    "remat",
    "quantization",
    "quantization_block",
    "mtp.loss_coef",
    "mtp.late_loss_coef",
    "mtp.late_after_tokens",
    "moe.bias_update_rate",
    "moe.bias_zero_mean",
    "moe.sequence_balance_coef",
    "moe.expert_balance_coef",
    "moe.device_balance_coef",
    "moe.communication_balance_coef",
    "moe.global_balance_coef",
    "moe.z_loss_coef",
    "moe.capacity_factor",
    "moe.dispatch",
    "moe.dispatch_buffer",
}
"""Fields of a ModelConfig that say how a model is trained or computed, not what its weights mean."""


def start_config(init: str, run_dir: Path) -> tuple[ModelConfig, str]:
    """The model and the tokenizer of what a run starts from.

    A run that has begun answers from its own folder, where `init` need not exist any more.

    Raises:
        RunError, ConfigError, DataError, CheckpointFilesError: `init` cannot be used.
    """
    if (run_dir / "config.json").exists():
        saved = load_config(run_dir)["config"]
        if saved.get("init") == init:
            return from_dict(ModelConfig, saved["model"]), saved["tokenizer"]
    if _is_run(init):
        config, definition = run_definition(Path(init))
        copy = Path(init) / TOKENIZER_FOLDER
        return definition.cfg, str(copy) if copy.is_dir() else config.get("tokenizer", "byte")
    folder, config = read_config(init)
    if tokenizer_file(folder) is None:
        raise DataError(f"{folder} has no tokenizer.json: put one there, experiments read text")
    return config, str(folder)


def refuse_conflicts(model: ModelConfig, weights: ModelConfig, init: str) -> None:
    """
    Raises:
        ConfigError: options changed what the weights decide.
    """
    for name, asked, decided in _differences(model, weights, ""):
        if name not in _TRAINING_FIELDS:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--model.{flag} = {asked!r}: the weights of --init {init} decide it ({decided!r}): leave it out"
            )
    if model.max_position > weights.max_position:
        raise ConfigError(
            f"--model.max-position = {model.max_position}: the checkpoint of --init {init} has a context of"
            f" {weights.max_position}; extend it with model.attention.rope in its config.json, or lower it"
        )


def _differences(a: Any, b: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    found = []
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if is_dataclass(x):
            found += _differences(x, y, f"{prefix}{field.name}.")
        elif x != y:
            found.append((prefix + field.name, x, y))
    return found


def start_weights(
    run: Run, init: str, definition: Definition, mesh: Mesh, phase: str = INIT_PHASE
) -> tuple[Arrays, Arrays]:
    """(params, rest) that a run starts from, on the mesh: read from `init` at its first start, then from its folder,
    where they are the checkpoint of `phase`.

    Raises:
        RunError, CheckpointError, ConfigError, CheckpointFilesError: they cannot be read or saved.
    """
    with run.checkpointer(phase, keep=1) as checkpoints:
        restored = checkpoints.restore(abstract_weights(definition, mesh))
        if restored is not None:
            return restored.state["params"], restored.state["rest"]
        if _is_run(init):
            weights = restore_weights(Path(init), definition, newest_phase(Path(init)), mesh)
            params, rest = weights.params, weights.rest
        else:
            loaded = load_pretrained(init, mesh if mesh.size > 1 else None)
            params, rest = loaded.params, loaded.rest
        checkpoints.save(0, {"params": params, "rest": rest}, {"init": init})
    return params, rest


def keep_tokenizer(run_dir: Path, name: str) -> Tokenizer:
    """The tokenizer of a run: at its first start that of this name, of which the run then keeps a copy.

    Raises:
        DataError: it cannot be read.
        RunError: it cannot be copied.
    """
    copy = run_dir / TOKENIZER_FOLDER
    if copy.is_dir():
        return load_tokenizer(copy)
    tokenizer = load_tokenizer(name)
    if not isinstance(tokenizer, HFTokenizer) or jax.process_index() != 0:
        return tokenizer
    source = tokenizer.file.parent
    files = {file: source / file for file in (*TOKENIZER_FILES, "generation_config.json")}
    if tokenizer.file.name != TIKTOKEN_FILE:
        files["tokenizer.json"] = tokenizer.file
    partial = copy.with_name(f".{TOKENIZER_FOLDER}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, path in files.items():
            if path.is_file():
                shutil.copyfile(path, partial / file)
        partial.rename(copy)
    except OSError as error:
        raise RunError(f"cannot copy the tokenizer {name} to {copy} ({error}): restore write access") from error
    return tokenizer


def _is_run(path: str) -> bool:
    try:
        load_config(path)
    except RunError:
        return False
    return True
