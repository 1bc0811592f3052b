"""The model that a tool acts on: that of a run, or of a Hugging Face checkpoint.

Heavy imports stand inside the functions, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe_jax.config import ConfigError, MeshConfig

ONE_DEVICE = MeshConfig(data=1)


class ToolError(Exception):
    """A tool cannot do what it was asked for: one line says what and how to mend it."""


@contextmanager
def mendable() -> Iterator[None]:
    """Turns what a user can mend into a ToolError."""
    from moe_jax.data import DataError
    from moe_jax.interop.weight_files import CheckpointFilesError
    from moe_jax.training.checkpoint import CheckpointError
    from moe_jax.training.run import RunError

    try:
        yield
    except (DataError, RunError, CheckpointError, CheckpointFilesError) as error:
        raise ToolError(str(error)) from error


@dataclass(frozen=True)
class Model:
    """A model with its weights and tokenizer."""

    title: str
    """Where it comes from."""
    version: str
    """Of a checkpoint, which may be exported anew under its title: when its files were written. Empty for a run."""
    definition: Any
    params: dict[str, Any]
    rest: dict[str, Any]
    tokenizer: Any
    generation: Mapping[str, Any] | None
    """A checkpoint's generation_config.json, {} if it has none; None for the model of a run."""
    pretrained: bool
    """Whether it began as a checkpoint, here or before: it then reads prompts as that checkpoint's makers meant it."""

    @property
    def chats(self) -> bool:
        """Whether it answers messages through a chat template, rather than completing texts."""
        return self.pretrained and self.tokenizer.has_chat_template


def check_source(run: Path | None, checkpoint: str | None, phase: str | None) -> None:
    """
    Raises:
        ToolError: not exactly one of run and checkpoint is given, or a phase without a run.
    """
    if (run is None) == (checkpoint is None):
        raise ToolError("name one model: --run RUN_FOLDER, or --checkpoint HUGGING_FACE_FOLDER")
    if phase is not None and run is None:
        raise ToolError(f"--phase {phase}: is for --run; a checkpoint has no phases")


def load_model(
    run: Path | None,
    checkpoint: str | None,
    phase: str | None,
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    mesh: MeshConfig = ONE_DEVICE,
) -> tuple[Model, Any]:
    """The model, and the mesh that its weights lie on: to be set (`jax.set_mesh`) while it is used.

    Raises:
        ToolError: the run, the checkpoint or its tokenizer cannot be used.
        ConfigError: a configuration that is not understood, or a mesh that does not fit the devices.
    """
    from moe_jax.sharding import make_mesh

    check_source(run, checkpoint, phase)
    placed = make_mesh(mesh)
    with mendable():
        if run is not None:
            return _of_run(run, phase, tokenizer, dtype, placed), placed
        assert checkpoint is not None
        return _of_checkpoint(checkpoint, tokenizer, dtype, placed), placed


def _of_run(run: Path, phase: str | None, tokenizer: Path | None, dtype: str | None, mesh: Any) -> Model:
    from moe_jax.model.definition import Definition
    from moe_jax.training.weights import newest_phase, restore_weights, run_definition, run_tokenizer

    config, definition = run_definition(run)
    phase = newest_phase(run, phase)
    if dtype is not None:
        definition = Definition.of(replace(definition.cfg, dtype=dtype))
    if tokenizer is None:
        reader = run_tokenizer(run, config, definition.cfg.vocab_size)
    else:
        reader = _named_tokenizer(tokenizer, definition.cfg.vocab_size)
    weights = restore_weights(run, definition, phase, mesh)
    title = f"{run}: {phase}, step {weights.step}"
    return Model(title, "", definition, weights.params, weights.rest, reader, None, bool(config.get("init")))


def _of_checkpoint(checkpoint: str, tokenizer: Path | None, dtype: str | None, mesh: Any) -> Model:
    from moe_jax.interop.pretrained import load_pretrained

    loaded = load_pretrained(checkpoint, mesh, dtype, packed=True)
    reader = loaded.tokenizer
    if tokenizer is not None:
        reader = _named_tokenizer(tokenizer, loaded.config.vocab_size)
        reader.stop_ids = tuple(dict.fromkeys([*reader.stop_ids, *_stop_ids(loaded.generation)]))
    if reader is None:
        raise ToolError(
            f"{checkpoint} has neither tokenizer.json nor tiktoken.model: name one, or its folder, with --tokenizer"
        )
    version = _version(loaded.folder) if loaded.folder else ""
    return Model(checkpoint, version, loaded.definition, loaded.params, loaded.rest, reader, loaded.generation, True)


def _version(folder: Path) -> str:
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _named_tokenizer(path: Path, vocab_size: int) -> Any:
    from moe_jax.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
        tokenizer.check_fits(vocab_size)
    except ConfigError as error:
        raise ToolError(f"--tokenizer {path}: {error}") from error
    return tokenizer


def _stop_ids(generation: Mapping[str, Any]) -> list[int]:
    ids = generation.get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
