"""What a device holds, computes and communicates in one step of this code, from the configuration alone.

Weights are divided exactly as `sharding.RULES` says. The rest is counted as the compiled program was seen to do it for
TPUs: weights travel in the model's dtype, are gathered anew in the backward pass, and those that are not experts' once
more with remat = "block".

B batch, S sequence, T tokens of a device, D model, L layers, E experts, K experts per token, H heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from jax.sharding import AbstractMesh

from moe_jax.analysis.cost import Collective, Kind, Step
from moe_jax.analysis.flops import kv_cache_bytes_per_token, quantizable_flops_per_token, training_flops_per_token
from moe_jax.config import ConfigError, MeshConfig, ModelConfig
from moe_jax.model.definition import Definition
from moe_jax.ops import attention
from moe_jax.sharding import RULES, partition_spec


@dataclass(frozen=True)
class Weight:
    """One stack of weights on a device."""

    name: str
    elements: int
    """Of the whole mesh."""
    held: int
    """Of a device."""
    gathered: int
    """Of a device, once the axis fsdp is gathered."""
    axes: frozenset[str]
    """Mesh axes that divide it."""

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.name


def mesh_sizes(mesh: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis.

    Raises:
        ConfigError: the axes' product is not the number of devices.
    """
    sizes = dataclasses.asdict(mesh)
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ConfigError(f"MeshConfig: {sizes} has {math.prod(sizes.values())} devices and the hardware {devices}")
    return sizes


def weights(cfg: ModelConfig, sizes: dict[str, int]) -> list[Weight]:
    """Every parameter, and how the mesh divides it."""
    # What is computed anew changes no weight, and shapes take a second.
    definition, mesh = (
        _definition(dataclasses.replace(cfg, remat="none", quantization="none")),
        AbstractMesh(tuple(sizes.values()), tuple(sizes)),
    )
    found = []
    for name in definition.param_names:
        variable = definition.variables[name]
        spec = partition_spec(variable.get_metadata().get("axes", ()), variable.shape, mesh)
        axes = frozenset(axis for rule in spec if rule for axis in ((rule,) if isinstance(rule, str) else rule))
        elements = math.prod(variable.shape)
        held = elements // math.prod(sizes[axis] for axis in axes)
        found.append(Weight(name, elements, held, held * (sizes["fsdp"] if "fsdp" in axes else 1), axes))
    return found


@functools.lru_cache(maxsize=8)
def _definition(cfg: ModelConfig) -> Definition:
    return Definition.of(cfg)


@dataclass(frozen=True)
class Memory:
    """Bytes of a device. `activations` and `temporaries` are estimates; the others are exact."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    """Kept from the forward pass for the backward one; when decoding, the cache."""
    temporaries: float
    """Of the layer, or the chunk of logits, that needs most at a time."""

    @property
    def total(self) -> float:
        return self.parameters + self.optimizer + self.gradients + self.activations + self.temporaries


@dataclass(frozen=True)
class Workload:
    step: Step
    memory: Memory
    tokens: int
    """Of a step, on all devices together."""
    model_flops_per_token: float
    """Those that MFU counts: causal attention, nothing twice, without MTP modules."""


def training_workload(
    cfg: ModelConfig,
    sizes: dict[str, int],
    batch: int,
    sequence: int,
    *,
    accumulation_steps: int = 1,
    moment_bytes: int = 8,
) -> Workload:
    """One optimizer step on `batch` rows of `sequence` tokens; `moment_bytes` of optimizer state per parameter.

    Raises:
        ConfigError: the batch does not divide into micro-batches, or one of them over the mesh's batch axes.
    """
    if batch % accumulation_steps:
        raise ConfigError(f"--batch {batch}: must be a multiple of --accumulation-steps {accumulation_steps}")
    rows = _rows(batch // accumulation_steps, sizes)
    all_weights = weights(cfg, sizes)
    held = sum(weight.held for weight in all_weights)
    width = 2 if cfg.dtype == "bfloat16" else 4
    T, D, M = rows * sequence, cfg.hidden_size, accumulation_steps
    layers, blocks = cfg.num_layers + cfg.mtp.depth, cfg.remat == "block"
    heads = cfg.attention.num_heads / sizes["tensor"]

    scores = computed_share(sequence) * rows * heads * sequence**2 * 4.0
    memory = _training_memory(cfg, all_weights, sizes, rows, sequence, M, moment_bytes)
    flops = M * T * executed_flops_per_token(cfg, sequence) / sizes["tensor"]
    passes = 4 if blocks else 3
    gathered = sum(weight.gathered for weight in all_weights)
    hbm = held * (2 * 4 + 2 * 4 + 2 * moment_bytes)  # parameters, gradients, moments: read and written
    hbm += M * passes * (width * gathered + layers * (2 * scores + 12 * T * D * width))
    collectives = tuple(_training_collectives(cfg, all_weights, sizes, T, M))
    model_flops = float(training_flops_per_token(cfg, sequence))
    quantized = 0.0
    if cfg.quantization in ("fp8", "int8"):
        quantized = M * T * passes * quantizable_flops_per_token(cfg) / sizes["tensor"]
    step = Step(flops, hbm, collectives, cfg.quantization, quantized)
    return Workload(step, memory, batch * sequence, model_flops)


def _training_memory(
    cfg: ModelConfig,
    all_weights: list[Weight],
    sizes: dict[str, int],
    rows: int,
    sequence: int,
    micro_batches: int,
    moment_bytes: int,
) -> Memory:
    """The three factors of `temporaries` are fitted to what XLA says of the cases in `launch/estimate.py`: copies into
    other layouts, insides of experts, and what its heap cannot fill are in them."""
    width = 2 if cfg.dtype == "bfloat16" else 4
    held = sum(weight.held for weight in all_weights)
    T, D, moe, N = rows * sequence, cfg.hidden_size, cfg.moe, sizes["expert"]
    layers, heads = cfg.num_layers + cfg.mtp.depth, cfg.attention.num_heads / sizes["tensor"]

    # A layer's backward pass: its gathered weights and their gradients, rows of experts, what each head holds.
    stacks = ("moe_blocks", cfg.num_moe_layers), ("dense_blocks", cfg.num_dense_layers)
    layer = max(_layer(all_weights, stack, count) for stack, count in stacks)
    if moe.num_experts:
        shared = N > 1 and moe.num_experts % N == 0
        insides = T * moe.num_experts_per_token * (moe.dispatch_buffer if shared else 1.0) * D
    else:
        insides = T * cfg.intermediate_size / sizes["tensor"]
    pairs = sequence**2 if computed_share(sequence) == 1 else attention._BLOCK**2
    per_head = max(86 * width * T * _query_width(cfg), 14 * rows * pairs)
    temporaries = 1.1 * width * layer + 5.5 * width * insides + heads * per_head
    # Before the layers' gradients there are any: the head, its gradient in float32, and that of a chunk of logits.
    head = (4 + width) * sum(weight.gathered for weight in all_weights if weight.name in ("head_DV", "embed_VD"))
    head = head / (1 if cfg.tie_word_embeddings else 2) + 3 * 2**28
    gradients = 4.0 * held * (2 if micro_batches > 1 else 1)
    return Memory(
        parameters=4.0 * held,
        optimizer=float(moment_bytes * held),
        gradients=gradients,
        activations=float(layers * T * D * width * (1 if cfg.remat == "block" else 8)),
        # XLA casts the stacks of weights before the loop over layers, not in it.
        temporaries=(width * held if width < 4 else 0) + max(temporaries, head - gradients),
    )


def executed_flops_per_token(cfg: ModelConfig, sequence: int) -> float:
    """FLOPs that a training step really does per token.

    Attention computes scores that the mask then hides, all of them or those of the blocks on the diagonal, and computes
    all of its scores anew in the backward pass, as the head does its logits; remat = "block" computes every block's
    forward pass anew.
    """
    causal = training_flops_per_token(cfg, sequence, include_mtp=True) / 3
    scores = 2 * (training_flops_per_token(cfg, sequence, causal=False, include_mtp=True) / 3 - causal)
    share = computed_share(sequence)
    forward = causal + (share - 0.5) * scores
    head = 2 * cfg.vocab_size * cfg.hidden_size * (1 + cfg.mtp.depth)
    return 3 * forward + (forward if cfg.remat == "block" else head) + 0.5 * share * scores


def computed_share(sequence: int) -> float:
    """Share of all pairs of a query and a key whose scores `ops.attention` computes: blocks in the future it leaves
    out, where it works in blocks."""
    if sequence**2 <= attention._MOST_SCORES:
        return 1.0
    blocks = math.ceil(sequence / attention._BLOCK)
    return (blocks + 1) / (2 * blocks)


def _training_collectives(
    cfg: ModelConfig, all_weights: list[Weight], sizes: dict[str, int], T: int, M: int
) -> Iterator[Collective]:
    width, blocks = (2 if cfg.dtype == "bfloat16" else 4), cfg.remat == "block"
    for weight in all_weights:
        num_bytes = float(width * weight.gathered)
        if "fsdp" in weight.axes and sizes["fsdp"] > 1:
            inside = "blocks" in weight.name
            # Experts that the recomputed forward pass gathers serve its gradients, too.
            again = blocks and inside and not weight.is_expert
            yield Collective("all-gather", ("fsdp",), num_bytes, M * (3 if again else 2), "weights")
            yield Collective("reduce-scatter", ("fsdp",), num_bytes, M, "gradients")
        elif weight.elements >= 2**20:
            yield from _over(("fsdp",), "all-reduce", num_bytes, M, "gradients", sizes)
        if weight.elements >= 2**20:
            others = tuple(axis for axis in ("data", "expert") if axis not in weight.axes)
            yield from _over(others, "all-reduce", float(width * weight.held), M, "gradients", sizes)

    token_bytes = float(T * cfg.hidden_size * width)
    layers = cfg.num_layers + cfg.mtp.depth
    yield from _over(("tensor",), "all-reduce", token_bytes, M * layers * (6 if blocks else 4), "activations", sizes)
    moe, N = cfg.moe, sizes["expert"]
    if not moe.num_experts or N == 1 or moe.num_experts % N:
        return
    sparse = M * (cfg.num_moe_layers + cfg.mtp.depth)
    if _gathers_tokens(cfg, N):
        yield Collective("all-gather", ("expert",), N * token_bytes, sparse * (3 if blocks else 2), "tokens")
        yield Collective("reduce-scatter", ("expert",), N * token_bytes, sparse * 2, "tokens")
    else:
        sent = token_bytes * moe.num_experts_per_token
        yield Collective("all-to-all", ("expert",), sent, sparse * (5 if blocks else 4), "tokens")


def decoding_workload(cfg: ModelConfig, sizes: dict[str, int], batch: int, context: int) -> Workload:
    """One token for each of `batch` rows that have `context` tokens in the cache; weights in the model's dtype.

    Raises:
        ConfigError: the rows do not divide over the mesh's batch axes.
    """
    rows = _rows(batch, sizes)
    width = 2 if cfg.dtype == "bfloat16" else 4
    all_weights = [weight for weight in weights(cfg, sizes) if not weight.name.startswith("mtp.")]
    held = width * sum(weight.held for weight in all_weights)
    cache = float(rows * context * kv_cache_bytes_per_token(cfg, width))
    a = cfg.attention
    per_head = 2 * a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else 2 * a.head_dim
    attention = 2 * a.num_heads * per_head * context * cfg.num_layers
    flops = training_flops_per_token(cfg, 0) / 3 + attention
    # Rows of all devices that share an expert read it once.
    used = min(1.0, batch * cfg.moe.num_experts_per_token / max(cfg.moe.num_experts, 1))
    read = sum(weight.gathered * (used if weight.is_expert else 1.0) for weight in all_weights)
    collectives = [
        Collective("all-gather", ("fsdp",), float(width * weight.gathered), 1, "weights")
        for weight in all_weights
        if "fsdp" in weight.axes and sizes["fsdp"] > 1
    ]
    token_bytes = float(rows * cfg.hidden_size * width)
    collectives += _over(("tensor",), "all-reduce", token_bytes, 2 * cfg.num_layers, "activations", sizes)
    N = sizes["expert"]
    if cfg.moe.num_experts and N > 1:
        if _gathers_tokens(cfg, N):
            collectives.append(Collective("all-gather", ("expert",), N * token_bytes, cfg.num_moe_layers, "tokens"))
            collectives.append(Collective("reduce-scatter", ("expert",), N * token_bytes, cfg.num_moe_layers, "tokens"))
        else:
            sent = token_bytes * cfg.moe.num_experts_per_token
            collectives.append(Collective("all-to-all", ("expert",), sent, 2 * cfg.num_moe_layers, "tokens"))
    layer = width * _layer(all_weights, "moe_blocks", cfg.num_moe_layers)
    head = width * sum(weight.gathered for weight in all_weights if weight.name == "head_DV")
    memory = Memory(float(held), 0.0, 0.0, cache, float(layer + head + rows * cfg.vocab_size * 4))
    step = Step(rows * flops / sizes["tensor"], width * read + cache, tuple(collectives))
    return Workload(step, memory, batch, float(flops))


def _rows(batch: int, sizes: dict[str, int]) -> int:
    """Rows of a device."""
    axes = [axis for axis in RULES["batch"] or () if axis in sizes]
    shards = math.prod(sizes[axis] for axis in axes)
    if batch == 0 or batch % shards:
        raise ConfigError(
            f"--batch: {batch} rows of a micro-batch do not divide over the {shards} devices of the axes"
            f" {', '.join(axes)}: choose a multiple"
        )
    return batch // shards


def _over(
    axes: tuple[str, ...], kind: Kind, num_bytes: float, count: float, what: str, sizes: dict[str, int]
) -> Iterator[Collective]:
    axes = tuple(axis for axis in axes if sizes[axis] > 1)
    if axes:
        yield Collective(kind, axes, num_bytes, count, what)


def _layer(all_weights: list[Weight], stack: str, layers: int) -> int:
    """Gathered elements of one layer of a stack."""
    return sum(weight.gathered for weight in all_weights if weight.name.startswith(stack)) // max(layers, 1)


def _gathers_tokens(cfg: ModelConfig, shards: int) -> bool:
    """`model.dispatch`'s choice."""
    if cfg.moe.dispatch == "auto":
        return shards <= cfg.moe.num_experts_per_token
    return cfg.moe.dispatch == "all_gather"


def _query_width(cfg: ModelConfig) -> int:
    a = cfg.attention
    return a.qk_nope_head_dim + a.qk_rope_head_dim if a.kind == "mla" else a.head_dim
