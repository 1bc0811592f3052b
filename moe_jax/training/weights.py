"""The weights in a run folder: which phase's, and where they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moe_jax.config import ConfigError, ModelConfig, from_dict
from moe_jax.data import DataError
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.model.definition import Arrays, Definition
from moe_jax.training.checkpoint import Checkpointer, CheckpointError
from moe_jax.training.run import RunError, load_config

TOKENIZER_FOLDER = "tokenizer"
"""In a run folder: a copy of the tokenizer that is not the byte-level one."""

_CONTROLS = ("control", "random_reward")
"""Phases that train a model for comparison, not for use."""


class Weights(NamedTuple):
    step: int
    params: Arrays
    rest: Arrays


def run_definition(run: Path) -> tuple[dict[str, Any], Definition]:
    """A run's configuration, and the definition of the model that it trains.

    Raises:
        RunError: the folder is not that of a run, or the run has no model.
        ConfigError: the model's configuration is illegal.
    """
    config = load_config(run)["config"]
    if "model" not in config:
        raise RunError(f"{run / 'config.json'} describes no model: this needs a run that trained one")
    return config, Definition.of(from_dict(ModelConfig, config["model"]))


def newest_phase(run: Path, asked: str | None = None) -> str:
    """The phase whose checkpoint is wanted: the one that was asked for, or the one that was logged last.

    Raises:
        RunError: it has no checkpoint.
    """
    with_checkpoint = {
        folder.name for folder in (run / "checkpoints").glob("*") if any(c.name.isdigit() for c in folder.iterdir())
    }
    if not with_checkpoint:
        raise RunError(f"{run} has no checkpoint yet: the run saves one at the end of each phase at the latest")
    if asked is not None:
        if asked not in with_checkpoint:
            raise RunError(f"{run} has no checkpoint of phase {asked!r}: use {' or '.join(sorted(with_checkpoint))}")
        return asked
    logged = []
    with suppress(FileNotFoundError), open(run / "metrics.jsonl", encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError):  # a run in progress may be writing the last line
                logged.append(json.loads(line)["phase"])
    choices = [phase for phase in with_checkpoint if phase not in _CONTROLS] or list(with_checkpoint)
    latest = {phase: index for index, phase in enumerate(logged)}
    return max(choices, key=lambda phase: (latest.get(phase, -1), phase))


def restore_weights(run: Path, definition: Definition, phase: str, mesh: Mesh | None = None) -> Weights:
    """The newest intact checkpoint of a phase, on the mesh or on the default device.

    Raises:
        RunError: there is none.
        CheckpointError: it is damaged, or of another model.
    """
    with Checkpointer(run / "checkpoints" / phase) as checkpoints:
        restored = checkpoints.restore(abstract_weights(definition, mesh), partial=True)
    if restored is None:
        raise RunError(f"{run / 'checkpoints' / phase} has no complete checkpoint")
    return Weights(restored.step, restored.state["params"], restored.state["rest"])


def older_weights(run: Path, definition: Definition, phase: str, newest: int) -> Iterator[Weights]:
    """The intact checkpoints before the newest one, oldest first, one at a time in memory."""
    with Checkpointer(run / "checkpoints" / phase) as checkpoints:
        for step in checkpoints.steps():
            if step >= newest:
                break
            # A damaged one is left out, with the warning of `restore`; so is one that a run in progress deletes.
            with suppress(CheckpointError):
                restored = checkpoints.restore(abstract_weights(definition), step=step, partial=True)
                if restored is not None:
                    yield Weights(restored.step, restored.state["params"], restored.state["rest"])


def abstract_weights(definition: Definition, mesh: Mesh | None = None) -> dict[str, dict[str, Any]]:
    """What to restore of a checkpoint: shapes and dtypes of params and rest, and on a mesh how they lie on it."""
    shardings: dict[str, Any] = {}
    if mesh is not None and mesh.size > 1:
        shardings = {name: sharding for part in definition.shardings(mesh) for name, sharding in part.items()}
    arrays = {
        name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings.get(name))
        for name, v in definition.variables.items()
    }
    params = {name: arrays.pop(name) for name in definition.param_names}
    return {"params": params, "rest": arrays}


def run_tokenizer(run: Path, config: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer that a run was trained with: the copy in its folder, or the one that its configuration names.

    Raises:
        RunError: it is not there any more, or does not fit the model.
    """
    copy = run / TOKENIZER_FOLDER
    try:
        tokenizer = load_tokenizer(copy if copy.is_dir() else config.get("tokenizer", "byte"))
        tokenizer.check_fits(vocab_size)
    except (ConfigError, DataError) as error:
        raise RunError(
            f"{run / 'config.json'}: {error}; put back the tokenizer that the run was trained with"
        ) from error
    return tokenizer
