"""Tools that act on a run or a checkpoint: `python -m moe_jax <tool>`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro

from moe_jax.config import ConfigError
from moe_jax.host_memory import keep_freed_memory
from moe_jax.tools.benchmark import benchmark_decode, benchmark_grpo, benchmark_moe
from moe_jax.tools.convert import convert
from moe_jax.tools.evaluate import evaluate
from moe_jax.tools.generate import generate
from moe_jax.tools.inspect_routing import inspect_routing
from moe_jax.tools.model import ToolError
from moe_jax.tools.quantize import quantize
from moe_jax.tools.rollouts import rollouts

app = tyro.extras.SubcommandApp()
for tool in (generate, evaluate, convert, quantize, inspect_routing, rollouts):
    app.command(tool)
benchmark = app.command(tyro.extras.SubcommandApp(), name="benchmark", help="Measures speed on this machine.")
benchmark.command(name="moe")(benchmark_moe)
benchmark.command(name="decode")(benchmark_decode)
benchmark.command(name="grpo")(benchmark_grpo)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a tool; the exit code: 0, or 2 for what the user can mend (said in one line on standard error)."""
    keep_freed_memory()
    try:
        app.cli(prog="python -m moe_jax", description="Tools that act on a run or a checkpoint.", args=args)
    except (ToolError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        # The reader of a pipe left; Python would complain when it flushes the output at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
