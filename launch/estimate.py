"""What training or serving a model costs, in seconds and without a device.

    python -m launch.estimate --preset deepseek_v3 --topology v5p:8x16x16 --mesh.fsdp 128 --mesh.expert 16 \\
        --batch 2048 --seq 4096 --tokens 14.8e12 [--json]
    python -m launch.estimate --preset deepseek_v3 --chip h800 --chips 2048 --mesh.fsdp 64 --mesh.expert 32 \\
        --mfu 0.3894 --tokens 14.8e12
    python -m launch.estimate --compare

Without --mfu the speed is the roofline's, which no machine reaches: the largest of the times that computing, HBM and
the interconnect take at their peaks. `python -m launch.compile` has XLA's word on memory and communication.

Memory is exact for parameters and optimizer. The rest has three factors fitted, with remat = "block" and rows of 4,096
tokens, to what the TPU compiler (libtpu 0.0.42.1) said of these cases, GB a chip at the peak without the program (.1 to
.4 GB); take 8 % as the tolerance, and 5 % for the interconnect's time:

    model            topology     fsdp expert tensor batch    XLA  estimate
    deepseek_v3      v5p:4x8x16     64      8      1   512   61.2      58.0
    deepseek_v3      v5p:4x8x16     16      8      4   128   45.3      43.4
    deepseek_v3      tpu7x:8x8x8   128      8      1  2048  137.4     140.0
    deepseek_v2_lite v5p:2x2x1       4      1      1     4   73.1      75.1
    deepseek_v2_lite v6e:4x4         4      4      1    16   24.9      26.2
    deepseek_v2_lite v4:2x2x4        4      4      1    16   25.0      26.2
    deepseek_v2_lite v4:2x4x4       32      1      1    32   12.9      13.3

In the last, the interconnect takes .52 s where .41 are estimated: where fsdp is the whole of a larger torus (of v4, v5p
and v6e), XLA adds experts' gradients up by all-reduces, whose bytes are twice as many.

With other remat it is rougher: what is kept is taken to be eight times as much.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_jax.analysis import cost
from moe_jax.config import ConfigError, MeshConfig, ModelConfig, OptimizerConfig, at_precision
from moe_jax.presets import deepseek_v3, get


@dataclass(frozen=True)
class Config:
    preset: str = "deepseek_v3"
    """A named model (`moe_jax/presets.py`), in bfloat16 with remat = "block"; the flags --model.… change it."""
    topology: str = ""
    """TPUs and their torus of chips: v4:4x4x8, v5e:16x16, v5p:8x16x16, v6e:16x16, tpu7x:4x4x4."""
    chip: str = ""
    """Instead of a topology: a kind of chip (`moe_jax/analysis/cost.py` has them) ..."""
    chips: int = 0
    """... and how many. With neither a topology nor a chip: eight H100."""
    batch: int = 0
    """Rows of a step; 0: one row a device, of a micro-batch."""
    seq: int = 4096
    """Tokens of a row."""
    accumulation_steps: int = 1
    """Micro-batches that a step's batch is divided into."""
    tokens: float = 14.8e12
    """Tokens of the whole training (when decoding: to be generated)."""
    mfu: float = 0.0
    """Model FLOPs utilisation, if it is known: of the bfloat16 peak, with causal attention. 0: the roofline's."""
    price: float = -1.0
    """Dollars per chip and hour; -1: the table's."""
    extra_chip_hours: float = 0.0
    """Added to the bill: context extension, post-training."""
    decode: bool = False
    """Generate, one token per row and step, instead of training."""
    context: int = 4096
    """Decoding: tokens of a row in the cache."""
    json: bool = False
    """Print JSON."""
    compare: bool = False
    """Print the bills of DeepSeek-V3, Llama 3.1 405B and a dense model of GPT-4's rumoured size, and nothing else."""
    precision: Literal["model", "bf16", "fp8", "int8"] = "model"
    """Arithmetic of the blocks' matrices, as `train.precision` of an experiment."""
    model: ModelConfig = field(default_factory=deepseek_v3)
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)

    def __post_init__(self) -> None:
        if not 0 <= self.mfu <= 1:
            raise ConfigError(f"--mfu {self.mfu}: must lie between 0 and 1")
        for name in ("seq", "accumulation_steps", "tokens", "context"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be greater than 0")
        if self.batch < 0:
            raise ConfigError(f"--batch {self.batch}: must be 0 or greater")


def parse(config: type, arguments: list[str], description: str | None) -> Any:
    """The configuration that the command line says; `--preset` replaces the model before other flags change it."""
    import tyro

    names = [*arguments, ""]
    given = [after for flag, after in itertools.pairwise(names) if flag == "--preset"]
    given += [flag.removeprefix("--preset=") for flag in arguments if flag.startswith("--preset=")]
    preset = given[-1] if given else config.preset
    model = dataclasses.replace(get(preset), dtype="bfloat16", remat="block")
    parsed = tyro.cli(config, default=config(preset=preset, model=model), args=arguments, description=description)
    return dataclasses.replace(parsed, model=at_precision(parsed.model, parsed.precision))


def hardware_of(config: Config) -> cost.Hardware:
    chip, chips = (config.chip, config.chips) if config.topology or config.chip else ("h100", config.chips or 8)
    hardware = cost.parse_hardware(config.topology, chip, chips)
    if config.price < 0:
        return hardware
    return dataclasses.replace(hardware, chip=dataclasses.replace(hardware.chip, dollars_per_hour=config.price))


def moment_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes of optimizer state per parameter; Muon keeps one moment of matrices, here of all."""
    return (1 if optimizer.name == "muon" else 2) * (2 if optimizer.moment_dtype == "bfloat16" else 4)


def estimate(config: Config) -> dict[str, Any]:
    """The figures under their names; seconds, bytes per device's chip, hours of all chips together.

    Raises:
        ConfigError: the mesh does not fit the hardware, or the batch the mesh.
    """
    from moe_jax.analysis.flops import kv_cache_bytes_per_token, parameter_counts, training_flops_per_token
    from moe_jax.analysis.workload import mesh_sizes

    cfg, hardware = config.model, hardware_of(config)
    sizes = mesh_sizes(config.mesh, hardware.devices)
    batch = config.batch or config.accumulation_steps * hardware.devices // sizes["tensor"]
    work = workload_of(config, sizes, batch)
    counts, devices = parameter_counts(cfg), hardware.chip.devices
    memory = {name: devices * value for name, value in dataclasses.asdict(work.memory).items()}
    figures = {
        "parameters_total": counts.total,
        "parameters_mtp": counts.mtp,
        "parameters_active": counts.active,
        "parameters_active_non_embedding": counts.active_non_embedding,
        "training_flops_per_token": training_flops_per_token(cfg, config.seq),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(cfg),
        "chips": hardware.chips,
        "mesh": sizes,
        "batch": batch,
        "bytes_per_chip": devices * work.memory.total,
        "memory_per_chip": memory,
        "hbm_per_chip": hardware.chip.hbm_bytes,
        "fits": devices * work.memory.total <= hardware.chip.hbm_bytes,
    }
    return figures | time_and_money(config, hardware, work, sizes)


def workload_of(config: Config, sizes: dict[str, int], batch: int) -> Any:
    """What a device does in a step of training or of decoding.

    Raises:
        ConfigError: the batch does not fit the mesh.
    """
    from moe_jax.analysis.workload import decoding_workload, training_workload

    if config.decode:
        return decoding_workload(config.model, sizes, batch, config.context)
    moments = moment_bytes(config.optimizer)
    steps = config.accumulation_steps
    return training_workload(config.model, sizes, batch, config.seq, accumulation_steps=steps, moment_bytes=moments)


def time_and_money(config: Config, hardware: cost.Hardware, work: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Step time, what bounds it, MFU, chip hours and dollars of a workload."""
    bound = cost.roofline(work.step, hardware, sizes)
    ideal = work.tokens * work.model_flops_per_token / (hardware.chips * hardware.chip.flops)
    seconds = ideal / config.mfu if config.mfu else bound.step_seconds
    price, watts = hardware.chip.dollars_per_hour, hardware.chip.watts
    speed, extra = work.tokens / seconds, config.extra_chip_hours
    bill = cost.bill(config.tokens, speed, hardware.chips, price, extra_chip_hours=extra, watts=watts)
    return {
        "step_seconds": seconds,
        "bound_by": "mfu given" if config.mfu else bound.bound_by,
        "roofline_seconds": {
            "compute": bound.compute_seconds,
            "hbm": bound.hbm_seconds,
            "interconnect": bound.interconnect_seconds,
        },
        "collective_bytes_per_device": collective_bytes(work.step.collectives),
        "mfu": ideal / seconds,
        "tokens_per_second": work.tokens / seconds,
        "days": bill.days,
        "chip_hours": bill.chip_hours,
        "dollars": bill.dollars,
        "dollars_per_chip_hour": price,
        "kilowatt_hours": bill.kilowatt_hours,
    }


def collective_bytes(collectives: Any) -> dict[str, float]:
    """Bytes of operands a step, by kind and axes; of an all-gather, of its results."""
    total: dict[str, float] = {}
    for collective in collectives:
        name = f"{collective.kind} {'+'.join(collective.axes)}"
        total[name] = total.get(name, 0.0) + collective.count * collective.num_bytes
    return total


def report(figures: dict[str, Any], config: Config) -> str:
    """The figures as a table for people."""
    memory = figures["memory_per_chip"]
    seconds = figures["roofline_seconds"]
    dollars, price = figures["dollars"], figures["dollars_per_chip_hour"]
    money = "no price is known: give --price" if dollars is None else f"${dollars:,.0f} at ${price:.2f} a chip hour"
    if figures["kilowatt_hours"] is not None:
        money += f", {figures['kilowatt_hours'] / 1e6:,.3g} GWh of the chips alone"
    parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in memory.items() if value)
    mesh = ", ".join(f"{name} {size}" for name, size in figures["mesh"].items())
    rows = [
        (
            "parameters",
            f"{figures['parameters_total'] / 1e9:.3f} B, {figures['parameters_active'] / 1e9:.3f} B active"
            f" ({figures['parameters_active_non_embedding'] / 1e9:.3f} B without embeddings)",
        ),
        ("training FLOPs per token", f"{figures['training_flops_per_token'] / 1e9:.1f} G (causal, without MTP)"),
        ("KV cache per token", f"{figures['kv_cache_bytes_per_token'] / 1e3:.3f} KB in bfloat16"),
        ("hardware", f"{figures['chips']} x {config.chip or config.topology}; {mesh}; batch {figures['batch']}"),
        (
            "memory per chip",
            f"{figures['bytes_per_chip'] / 1e9:.1f} of {figures['hbm_per_chip'] / 1e9:.1f} GB:"
            f" {'fits' if figures['fits'] else 'DOES NOT FIT'} ({parts})",
        ),
        (
            "roofline",
            f"compute {seconds['compute']:.3g} s, HBM {seconds['hbm']:.3g} s,"
            f" interconnect {seconds['interconnect']:.3g} s",
        ),
        ("step", f"{figures['step_seconds']:.4g} s, bound by {figures['bound_by']}; MFU {100 * figures['mfu']:.1f} %"),
        *((f"  {name}", f"{value / 1e9:.2f} GB") for name, value in figures["collective_bytes_per_device"].items()),
        (
            f"{config.tokens:.3g} tokens",
            f"{figures['days']:,.1f} days, {figures['chip_hours']:,.0f} chip hours, {money}",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(arguments: list[str] | None = None) -> int:
    try:
        config = parse(Config, sys.argv[1:] if arguments is None else arguments, __doc__)
        if config.compare:
            from moe_jax.analysis.bills import bills, comparison

            print(json.dumps(bills(), indent=2) if config.json else comparison())
            return 0
        figures = estimate(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2) if config.json else report(figures, config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
