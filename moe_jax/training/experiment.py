"""What every experiment shares: its command line, its run folder, its mesh, its stop signals, its way to fail."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.training.run import Run
    from moe_jax.training.signals import StopGuard

Config = TypeVar("Config")


@dataclass(frozen=True)
class Session:
    """One process's part in a run."""

    run: Run
    guard: StopGuard
    mesh: Mesh
    """Set for the session (`jax.set_mesh`)."""


def main(
    name: str,
    default: Config | dict[str, Config],
    body: Callable[[Config, Session], None],
    arguments: list[str] | None = None,
    from_init: Callable[[Config], Config] = lambda config: config,
) -> None:
    """Runs an experiment: parses the command line, opens the run folder, and calls `body(config, session)`.

    `default` is the experiment's configuration, a frozen dataclass with `seed`, `run_dir`, `init`, `preset`,
    `tokenizer`, `model`, `mesh`; every field is a flag. It may be several, by what follows `--data.source`, the first
    being that of the bare command. `--preset` replaces the model before the other flags change it; so does `--init`,
    with the model and the tokenizer of a checkpoint, after which `from_init` gives the defaults for such a start. An
    empty `run_dir` becomes `runs/<name>-seed<seed>`. What a user can mend ends in one line on standard error and exit
    code 2; a signal in 130 or 143, everything saved.
    """
    # Not at the top: `--help` and a typo should not wait for jax.
    import tyro

    from moe_jax import presets
    from moe_jax.config import ConfigError
    from moe_jax.host_memory import keep_freed_memory

    keep_freed_memory()
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if isinstance(default, dict):
        default = default.get(_value_of("--data.source", arguments), next(iter(default.values())))
    description = sys.modules[type(default).__module__].__doc__
    init = _value_of("--init", arguments)
    try:
        if init:
            default = from_init(_starting_from(init, default, name, arguments))
        if preset := _value_of("--preset", arguments):
            if init:
                raise ConfigError(f"--preset {preset}: --init {init} brings its own model; leave one of them out")
            default = replace(default, preset=preset, model=presets.get(preset))  # pyright: ignore[reportArgumentType]
        config = tyro.cli(type(default), default=default, args=arguments, description=description)
        if init:
            _refuse_conflicts(config, default, init)
    except ConfigError as error:
        sys.exit(_fail(error))

    import jax

    from moe_jax.config import to_dict
    from moe_jax.data import DataError
    from moe_jax.interop.weight_files import CheckpointFilesError
    from moe_jax.sharding import make_mesh
    from moe_jax.training.checkpoint import CheckpointError
    from moe_jax.training.distributed import DistributedError, StopAgreement, ending_together, initialize
    from moe_jax.training.loop import NonFiniteError
    from moe_jax.training.run import Run, RunError
    from moe_jax.training.signals import StopGuard, Stopped, farewell

    values = to_dict(config)
    if values["seed"] < 0:
        sys.exit(_fail(ConfigError(f"seed = {values['seed']}: must be 0 or greater")))
    run_dir = values.pop("run_dir") or f"runs/{name}-seed{values['seed']}"
    mistakes = (ConfigError, DataError, CheckpointFilesError)
    foreseen = (*mistakes, RunError, CheckpointError, DistributedError, NonFiniteError, OSError)
    try:
        processes = initialize()
        if jax.process_index() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process); the first one reports
        # Several processes have to find the point where all of them stop, and none can save alone.
        patience = {"agree": StopAgreement(), "grace_seconds": 60} if processes else {}
        with ending_together(foreseen), StopGuard(**patience) as guard, Run.open(run_dir, name, values) as run:
            try:
                mesh = make_mesh(config.mesh)  # pyright: ignore[reportAttributeAccessIssue]
                with jax.set_mesh(mesh):
                    body(config, Session(run, guard, mesh))
            except mistakes:
                run.discard()
                raise
    except foreseen as error:
        sys.exit(_fail(error))
    except Stopped as stop:
        print(farewell(stop.signum, stop.where), file=sys.stderr)
        sys.exit(stop.exit_code)


def _starting_from(init: str, default: Any, name: str, arguments: list[str]) -> Any:
    """The defaults with the model and the tokenizer of a checkpoint.

    Raises:
        ConfigError: it cannot be used.
    """
    from moe_jax.config import ConfigError
    from moe_jax.data import DataError
    from moe_jax.interop.weight_files import CheckpointFilesError
    from moe_jax.training.run import RunError
    from moe_jax.training.start import start_config

    seed = _value_of("--seed", arguments) or default.seed
    run_dir = _value_of("--run-dir", arguments) or f"runs/{name}-seed{seed}"
    try:
        model, tokenizer = start_config(init, Path(run_dir))
    except (DataError, RunError, CheckpointFilesError) as error:
        raise ConfigError(f"--init {init}: {error}") from error
    return replace(default, init=init, preset="", model=model, tokenizer=tokenizer)


def _refuse_conflicts(config: Any, default: Any, init: str) -> None:
    """
    Raises:
        ConfigError: flags changed what the weights or the tokenizer of `init` decide.
    """
    from moe_jax.config import ConfigError
    from moe_jax.training.start import refuse_conflicts

    refuse_conflicts(config.model, default.model, init)
    if config.tokenizer != default.tokenizer:
        raise ConfigError(f"--tokenizer {config.tokenizer}: --init {init} brings its own; leave one of them out")


def _value_of(flag: str, arguments: list[str]) -> str:
    """The value that follows a flag on the command line, empty if it is not there."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument == flag:
            return following
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return ""


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
