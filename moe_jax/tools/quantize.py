"""`python -m moe_jax quantize`: a model's matrices in 8 or 4 bits, with what that costs and saves.

Seen on experiments/pretrain's model (`--model.mtp.depth 0 --run-dir R`, seed 0: 344 k parameters in float32, 10 % not
quantised), `quantize --run R --batches 16 --sequence-length 256`; perplexity per byte 5.2104 before:

    bits    weights    and activations    on disk      in memory
    int8    -.01 %     +.08 %             36 %         34 %
    fp8     +.35 %     +.54 %             34 %         34 %
    int4    +3.93 %    +3.98 %            26 %         24 %
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_jax.config import MeshConfig, TextConfig
from moe_jax.tools.convert import exportable
from moe_jax.tools.model import ONE_DEVICE, ToolError, check_source, mendable

if TYPE_CHECKING:
    from moe_jax.interop.pretrained import Pretrained

REPORT = "quantization.json"
_TEXT = TextConfig()


def quantize(
    bits: Literal["fp8", "int8", "int4"],
    out: Path,
    run: Path | None = None,
    checkpoint: str | None = None,
    phase: str | None = None,
    activations: bool = False,
    block: int = 128,
    data: TextConfig = _TEXT,
    batches: int = 16,
    batch_size: int = 8,
    sequence_length: int = 512,
    mesh: MeshConfig = ONE_DEVICE,
) -> None:
    """Writes a model with its blocks' matrices rounded to 8 or 4 bits, and says what that does to its perplexity.

    Weights are rounded to the nearest: "fp8" in DeepSeek-V3's blocks of 128 x 128, "int8" with a scale per output,
    "int4" with one per output and `block` inputs. Norms, router, embedding and head stay as they are. The folder is a
    Hugging Face checkpoint (FP8 as DeepSeek releases it, integers as compressed-tensors has them) that every tool here
    takes; generate and evaluate keep the weights packed in memory, convert and --init make floats of them again. Its
    file quantization.json has the figures printed.

    Args:
        bits: What the matrices are stored in.
        out: The folder to write; must not exist yet, or be empty.
        run: The folder of a run, finished or in progress.
        checkpoint: A Hugging Face folder, or the name of a repository.
        phase: Whose checkpoint of the run: base, grpo, ... By default the phase trained last, controls aside.
        activations: Products are also to round what they multiply the weights with, to 8 bits as it comes.
        block: Of int4: inputs that share a scale, or so many of them as divide every matrix's.
        data: The text for the perplexity; by default the Python standard library's held-out sources.
        batches: How much of its validation part is read: batches spread evenly over it; 0 is all.
        batch_size: Rows of a batch.
        sequence_length: Tokens of a row.
        mesh: Devices that a large model is spread over.
    """
    check_source(run, checkpoint, phase)
    for name, value, least in (
        ("batches", batches, 0),
        ("batch-size", batch_size, 1),
        ("sequence-length", sequence_length, 2),
    ):
        if value < least:
            raise ToolError(f"--{name} {value}: must be at least {least}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ToolError(f"--out {out}: is there already; name another folder")

    import jax

    from moe_jax.data.text import TextCorpus, spread_validation_batches
    from moe_jax.interop.low_bits import LowBits
    from moe_jax.interop.pretrained import load_pretrained, save_pretrained
    from moe_jax.sharding import make_mesh, put_batch
    from moe_jax.training.supervised import BitsPerByte

    low_bits, placed = LowBits(bits, activations, block), make_mesh(mesh)

    with mendable(), ExitStack() as stack:
        if run is not None:
            title, model = stack.enter_context(exportable(run, phase, mesh))
        else:
            assert checkpoint is not None
            title, model = checkpoint, load_pretrained(checkpoint, placed)
        tokenizer, length = model.tokenizer, min(sequence_length, model.config.max_position)
        if tokenizer is None:
            raise ToolError(f"{checkpoint} has neither tokenizer.json nor tiktoken.model: put one there")
        texts = spread_validation_batches(TextCorpus.load(data.path), tokenizer, batch_size, length, batches)

        def figures(model: Pretrained) -> dict[str, float]:
            measure = BitsPerByte(model.definition, tokenizer.token_bytes_V, (tokenizer.pad_id,))
            with jax.set_mesh(placed):
                return measure(model.params, model.rest, (put_batch(batch, placed) for batch in texts))

        before = figures(model) | _sizes(model)
        save_pretrained(model, out, low_bits=low_bits)
        del model
        packed = load_pretrained(out, placed, packed=True)
        after = figures(packed) | _sizes(packed)
    report = {
        "model": title,
        "bits": bits,
        "activations": activations,
        "data": data.path,
        "rows": batch_size * len(texts),
    }
    report |= {"sequence_length": length, "before": before, "after": after}
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{title} → {out} ({bits}{' weights and activations' if activations else ''})\n{_table(before, after)}")


def _sizes(model: Pretrained) -> dict[str, float]:
    """Bytes on disk (of a run's model: as `convert` would write it) and in memory."""
    import jax
    import jax.numpy as jnp

    arrays = jax.tree.leaves((model.params, model.rest))
    if model.folder is None:
        disk = sum(array.size for array in arrays) * jnp.dtype(model.config.dtype).itemsize
    else:
        disk = sum(file.stat().st_size for file in model.folder.glob("*.safetensors"))
    return {"bytes_on_disk": disk, "bytes_in_memory": sum(array.nbytes for array in arrays)}


def _table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    def row(name: str, old: float, new: float, form: str) -> str:
        return f"{name:<22}{old:>12{form}}{new:>12{form}}{100 * (new / old - 1):>+10.2f} %"

    def perplexity(figures: Mapping[str, Any]) -> float:
        return math.exp(min(figures["loss"], 700))

    return "\n".join(
        [
            f"{'':<22}{'before':>12}{'after':>12}",
            row("perplexity per token", perplexity(before), perplexity(after), ".4f"),
            row("bits per byte", before["bits_per_byte"], after["bits_per_byte"], ".4f"),
            row("on disk, MB", before["bytes_on_disk"] / 1e6, after["bytes_on_disk"] / 1e6, ".3f"),
            row("in memory, MB", before["bytes_in_memory"] / 1e6, after["bytes_in_memory"] / 1e6, ".3f"),
        ]
    )
