"""Compiles the real step for TPUs that are not here, and says what it needs and what it costs.

    pip install -e '.[tpu]'
    python -m launch.compile --preset deepseek_v3 --topology v5p:4x8x16 --mesh.fsdp 16 --mesh.expert 8 \\
        --mesh.tensor 4 --batch 128 [--search] [--decode --context 8192] [--precision fp8] [--json]

No weight is made: XLA's compiler for TPUs works on shapes and shardings. From it come the bytes of a device's memory,
the collectives (kinds, bytes, mesh axes; loops counted as often as they run), and the matrix products with the types of
their operands. FLOPs and HBM traffic are counted from the configuration, since XLA counts the body of a loop once and
ragged products at the size of their buffers.

Seen (`--preset deepseek_v2_lite --topology v5p:2x2x1 --mesh.fsdp 4 --batch 4`): 73.2 of 102.0 GB a chip, 0.391 s a step
bound by the interconnect, a roofline's MFU of 37.5 %. MaxText publishes 29.4 % for this model and slice: measured, with
overlap and kernels, where ours is what no machine reaches.

With --precision fp8 on tpu7x, or int8 on v6e, all products of blocks' matrices are of f8e4m3fn or s8 operands in the
compiled program (libtpu 0.0.42): linear maps and experts, forward, again under remat, and both gradients. XLA turns
none into bfloat16. What that gains of a training step's roofline (launch.estimate with these flags, --seq 4096):

    --preset        --topology    --mesh …; --batch          computing, s   step, s (bound by)
    llama_3_1_8b    tpu7x:2x2x1   fsdp 8; 32                 .930 → .533    .930 (compute) → .533 (compute)
    llama_3_1_8b    v6e:4x4       fsdp 16; 32                .584 → .335    .584 (compute) → .490 (HBM)
    llama_3_1_405b  tpu7x:8x8x8   fsdp 1024; 1024            11.8 → 6.07    11.8 (compute) → 10.3 (interconnect)
    deepseek_v3     tpu7x:8x8x8   fsdp 128, expert 8; 2048   2.55 → 1.52    5.50 (interconnect), both

Weights and tokens travel in bfloat16 in any case. With blocks of 128 (the default) a product is a loop that adds up
float32 sums; their traffic is not in the roofline. --model.quantization-block 0 has one product without a loop.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch import estimate
from moe_jax.analysis import cost
from moe_jax.config import ConfigError, MeshConfig


@dataclass(frozen=True)
class Config(estimate.Config):
    topology: str = "v5p:2x2x1"
    """TPUs and their torus of chips: v4:4x4x8, v5e:16x16, v5p:8x16x16, v6e:16x16, tpu7x:4x4x4."""
    search: bool = False
    """Try meshes, rematerialisation and micro-batches by estimate, print the best, and compile the first ..."""
    search_compile: int = 1
    """... so many of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search_compile < 0:
            raise ConfigError(f"--search-compile {self.search_compile}: must be 0 or greater")
        if self.chip or self.chips:
            raise ConfigError("--chip and --chips are launch.estimate's: give a --topology of TPUs to compile for")


@dataclass(frozen=True)
class Compiled:
    """What XLA says of a program."""

    fits: bool
    memory: dict[str, float]
    """Bytes of a device. If it does not fit, only `temporaries`."""
    hlo: str
    """Empty if it does not fit."""
    seconds: float
    """To trace and compile."""


def topology_devices(topology: str) -> list[Any]:
    """JAX devices of a topology, as the TPU compiler knows them.

    Raises:
        ConfigError: libtpu is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("libtpu, the compiler for TPUs, is not installed: pip install -e '.[tpu]' (no TPU is needed)")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock is for chips; compilers can run side by side
    from jax.experimental import topologies

    # A v4 chip's two cores are one device on Cloud TPU; without being asked, libtpu's compiler takes them for two.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(topology_name=topology, platform="tpu", **options).devices)
    except Exception as error:  # libtpu raises several kinds
        raise ConfigError(f"--topology {topology!r}: libtpu refuses it: {str(error).splitlines()[0]}") from error


def compile_step(config: Config, mesh: Any, batch: int) -> Compiled:
    """Compiles one training step, or one step of decoding, from abstract arrays with the shardings of the real ones."""
    import jax

    start = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            jitted, arguments = (_decoding if config.decode else _training)(config, mesh, batch)
            compiled = jitted.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"temporaries \(([\d.]+)G\)|Used ([\d.]+)G of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = float(next(filter(None, needed.groups()))) * cost.GIB if needed else math.inf
        return Compiled(False, {"temporaries": size}, "", time.monotonic() - start)
    stats = compiled.memory_analysis()
    arrays = arguments[0] if not config.decode else None
    state = {} if arrays is None else {"parameters": _shard_bytes(arrays.params)}
    held = stats.argument_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # At the peak. `temp_size_in_bytes` is up to half as much again as the block of temporaries that XLA's buffer
    # assignment has (libtpu 0.0.42), and the program with it.
    memory = state | {
        "optimizer" if state else "arguments": held - sum(state.values()),
        "outputs not in place": outputs,
        "temporaries": max(stats.peak_memory_in_bytes - held - outputs, 0),
        "code": stats.generated_code_size_in_bytes,
    }
    memory = {name: float(value) for name, value in memory.items()}
    return Compiled(True, memory, compiled.as_text(), time.monotonic() - start)


def _training(config: Config, mesh: Any, batch: int) -> tuple[Any, tuple]:
    """The update that `experiments.pretrain` makes, and its abstract arguments."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from moe_jax.model.definition import Definition
    from moe_jax.sharding import partition_spec
    from moe_jax.training.optimizer import make_optimizer
    from moe_jax.training.state import TrainState, make_update, moment_shardings
    from moe_jax.training.supervised import make_loss, make_totals

    definition = Definition.of(config.model)
    optimizer = make_optimizer(config.optimizer, 1000, definition)
    params, rest = _abstract(definition, mesh, None)
    moments = jax.eval_shape(optimizer.init, params)

    def placed(leaf: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    step = placed(jax.ShapeDtypeStruct((), jnp.int32), NamedSharding(mesh, jax.sharding.PartitionSpec()))
    moments = jax.tree.map(placed, moments, moment_shardings(moments, definition, mesh))
    state = TrainState(step, params, rest, moments)
    shape = (batch, config.seq)
    rows = NamedSharding(mesh, partition_spec(("batch", None), shape, mesh))
    names = ("tokens_BS", "segment_ids_BS", "positions_BS")
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name in names}
    update = make_update(
        make_loss(definition),
        make_totals(definition),
        optimizer,
        accumulation_steps=config.accumulation_steps,
        balance=config.model.moe,
    )
    return update, (state, arrays)


def _decoding(config: Config, mesh: Any, batch: int) -> tuple[Any, tuple]:
    """One token for every row from a cache that holds `context` tokens; weights in the model's dtype."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from moe_jax.model.definition import Definition
    from moe_jax.model.transformer import make_cache
    from moe_jax.sharding import partition_spec

    cfg = dataclasses.replace(config.model, mtp=dataclasses.replace(config.model.mtp, depth=0))
    definition = Definition.of(cfg)
    params, rest = _abstract(definition, mesh, cfg.dtype)

    def place(x: Any, *axes: str | None) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition_spec(axes, x.shape, mesh)))

    def step(params: Any, rest: Any, tokens_B1: Any, cache: Any) -> Any:
        model = definition.merge(params, rest)
        output = model(tokens_B1, cache=cache)
        return jnp.argmax(model.logits(output.hidden_BSD), axis=-1), output.cache

    cache = jax.eval_shape(lambda: make_cache(cfg, batch, config.context))
    entries = [
        jax.tree.map(lambda x: place(x, "batch", *[None] * (x.ndim - 2)), stack) for stack in (cache.dense, cache.moe)
    ]
    cache = cache._replace(
        dense=entries[0], moe=entries[1], valid_BT=place(cache.valid_BT, "batch", None), length=place(cache.length)
    )
    tokens_B1 = place(jax.ShapeDtypeStruct((batch, 1), jnp.int32), "batch", None)
    return jax.jit(step, donate_argnums=3), (params, rest, tokens_B1, cache)


def _abstract(definition: Any, mesh: Any, dtype: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` and `rest` as shapes with shardings."""
    import jax

    def arrays(shardings: dict[str, Any], dtype: str | None) -> dict[str, Any]:
        variables = definition.variables
        return {
            name: jax.ShapeDtypeStruct(variables[name].shape, dtype or variables[name].dtype, sharding=sharding)
            for name, sharding in shardings.items()
        }

    params, rest = definition.shardings(mesh)
    return arrays(params, dtype), arrays(rest, None)


def _shard_bytes(tree: Any) -> int:
    import jax

    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan(config: Config) -> dict[str, Any]:
    """The estimate's figures with XLA's in place of its own where XLA knows better.

    Memory and collectives are XLA's; `estimated_bytes_per_chip` and `estimated_collective_bytes_per_device` keep what
    was estimated.

    Raises:
        ConfigError: see `topology_devices`, `sharding.make_mesh` and `estimate.estimate`.
    """
    from moe_jax.analysis import hlo
    from moe_jax.sharding import make_mesh

    figures = estimate.estimate(config)
    mesh = make_mesh(config.mesh, topology_devices(config.topology))
    compiled = compile_step(config, mesh, figures["batch"])
    hardware = estimate.hardware_of(config)
    devices, sizes = hardware.chip.devices, figures["mesh"]
    total = devices * sum(compiled.memory.values())
    figures |= {
        "compile_seconds": compiled.seconds,
        "estimated_bytes_per_chip": figures["bytes_per_chip"],
        "estimated_collective_bytes_per_device": figures["collective_bytes_per_device"],
        "bytes_per_chip": total,
        "memory_per_chip": {name: devices * value for name, value in compiled.memory.items()},
        "fits": compiled.fits and total <= hardware.chip.hbm_bytes,
    }
    if not compiled.fits:
        return figures
    figures |= _products(compiled.hlo)
    found = hlo.collectives(compiled.hlo, sizes)
    work = estimate.workload_of(config, sizes, figures["batch"])
    # Ragged exchanges send what the routing gives; buffers are that many times an even load.
    room = config.model.moe.dispatch_buffer
    seen = tuple(
        cost.Collective("all-to-all", item.axes, item.num_bytes / room, item.count, item.op_name)
        if item.kind == "ragged-all-to-all"
        else cost.Collective(item.kind, item.axes, item.num_bytes, item.count, item.op_name)  # pyright: ignore
        for item in found
        if item.axes
    )
    work = dataclasses.replace(work, step=dataclasses.replace(work.step, collectives=seen))
    largest = sorted(found, key=lambda item: -item.num_bytes * item.count)[:12]
    figures["largest_collectives"] = [
        dataclasses.asdict(item) | {"total_bytes": item.num_bytes * item.count} for item in largest
    ]
    return figures | estimate.time_and_money(config, hardware, work, sizes)


_PLACES = ("attention", "attention_scores", "attention_blocks", "attention_blocks_gradient", "ffn", "router")
_PLACES += ("experts", "shared_experts", "token_logprobs", "token_logprobs_gradient", "optimizer")


def _products(text: str) -> dict[str, Any]:
    """A device's matrix products by their place in the model and the types of their operands, most FLOPs first, and the
    share of all FLOPs whose operands have 8 bits."""
    from moe_jax.analysis import hlo

    counts: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0])
    found = hlo.products(text)
    for product in found:
        place = "/".join(dict.fromkeys(re.findall(rf"\b({'|'.join(_PLACES)})\b", product.op_name))) or "elsewhere"
        total = counts[place, " x ".join(product.operands)]
        total[0] += product.count
        total[1] += product.count * product.flops
    rows = [
        {"place": place, "operands": operands, "count": int(count), "flops": flops}
        for (place, operands), (count, flops) in sorted(counts.items(), key=lambda item: -item[1][1])
    ]
    narrow = sum(product.count * product.flops for product in found if product.is_8_bit)
    return {"products": rows, "flops_share_in_8_bits": narrow / max(sum(row["flops"] for row in rows), 1)}


def candidates(config: Config) -> Iterator[tuple[Config, dict[str, Any]]]:
    """Meshes × rematerialisation × micro-batches, with their estimates; meshes that the torus has dimensions for."""
    hardware = estimate.hardware_of(config)
    devices = hardware.devices
    batch = config.batch or devices
    powers = [2**n for n in range(devices.bit_length()) if devices % 2**n == 0]
    experts = config.model.moe.num_experts
    for tensor in (size for size in powers if size <= 8 and config.model.attention.num_heads % size == 0):
        for expert in (size for size in powers if size == 1 or (experts and experts % size == 0)):
            if devices % (tensor * expert):
                continue
            sizes = {"fsdp": devices // tensor // expert, "expert": expert, "tensor": tensor}
            placed = cost.torus_dimensions(hardware.grid, sizes)
            if any(size > 1 and not placed[name] for name, size in sizes.items()):
                continue
            for remat in ("block", "dots", "none"):
                for steps in (1, 2, 4, 8, 16) if not config.decode else (1,):
                    if batch % (steps * devices // tensor):
                        continue
                    tried = dataclasses.replace(
                        config,
                        batch=batch,
                        accumulation_steps=steps,
                        mesh=MeshConfig(data=1, **sizes),
                        model=dataclasses.replace(config.model, remat=remat),
                    )
                    yield tried, estimate.estimate(tried)


def search(config: Config) -> list[tuple[Config, dict[str, Any]]]:
    """Candidates, those that fit first, by tokens a second."""

    def rank(item: tuple[Config, dict[str, Any]]) -> tuple:
        return not item[1]["fits"], -item[1]["tokens_per_second"], item[1]["bytes_per_chip"]

    return sorted(candidates(config), key=rank)


def report(figures: dict[str, Any], config: Config) -> str:
    """The estimate's table with what XLA says added."""
    lines = [estimate.report(figures, config)]
    by_place: defaultdict[str, float] = defaultdict(float)
    for item in figures.get("largest_collectives", []):
        axes = "+".join(item["axes"])
        by_place[f"{item['kind']} {axes} {item['shape']} x {item['count']}: {item['op_name']}"] += item["total_bytes"]
    lines += [f"  {size / 1e9:8.2f} GB  {place}" for place, size in by_place.items()]
    if figures.get("products"):
        lines.append(f"matrix products of a device: {100 * figures['flops_share_in_8_bits']:.1f} % of FLOPs in 8 bits")
    for row in figures.get("products", []):
        lines.append(f"  {row['flops'] / 1e9:12.3f} GFLOP  {row['count']:6d}  {row['operands']}  {row['place']}")
    lines.append(
        f"compiled in {figures['compile_seconds']:.0f} s; estimated without compiling:"
        f" {figures['estimated_bytes_per_chip'] / 1e9:.1f} GB a chip"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported
    try:
        config = estimate.parse(Config, sys.argv[1:] if arguments is None else arguments, __doc__)
        configs = [config]
        if config.search:
            ranked = search(config)
            if not ranked:
                raise ConfigError(f"--search: no mesh divides --batch {config.batch} on {config.topology}; raise it")
            configs = [tried for tried, _ in ranked[: config.search_compile]]
            if not config.json:
                print(table(ranked[:10]))
        all_figures = [plan(tried) for tried in configs]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if config.json:
        print(json.dumps(all_figures if config.search else all_figures[0], indent=2))
    else:
        for tried, figures in zip(configs, all_figures, strict=True):
            print(report(figures, tried))
    return 0


def table(ranked: list[tuple[Config, dict[str, Any]]]) -> str:
    """Candidates, one a line."""
    lines = ["fsdp expert tensor remat micro-batches    GB/chip  fits   step s   MFU %  bound by (estimated)"]
    for config, figures in ranked:
        mesh = config.mesh
        lines.append(
            f"{mesh.fsdp:4d} {mesh.expert:6d} {mesh.tensor:6d} {config.model.remat:>5} {config.accumulation_steps:13d}"
            f" {figures['bytes_per_chip'] / 1e9:10.1f} {'yes' if figures['fits'] else 'no':>5}"
            f" {figures['step_seconds']:8.3g} {100 * figures['mfu']:7.1f}  {figures['bound_by']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
