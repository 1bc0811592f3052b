"""Weights in 8 and 4 bits as files hold them: DeepSeek's block-scaled FP8, and integers as compressed-tensors has them.

- "fp8": `X` as E4M3 and `X_scale_inv`, a scale per 128 x 128 (`interop.fp8`).
- "int4", and "int8" of weights alone: format "pack-quantized" of https://github.com/vllm-project/compressed-tensors.
  `X_packed` int32 [R, …], whose bits from the lowest on hold successive columns, each as an unsigned number that counts
  from the lowest; `X_scale` [R, C / group], one per row and group of columns; `X_shape` int64 (R, C).
- "int8" of activations too: "int-quantized". `X` int8 [R, C] and `X_scale`.

vLLM and, with that library, transformers read them; a loader that does not know the format finds no tensor `X` to
misread. Numbers are symmetric, -7 … 7 and -127 … 127.

Shapes: R rows (outputs), C columns (inputs), G groups of columns; leading axes (stacked experts) are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from moe_jax.config import ConfigError
from moe_jax.interop import fp8

if TYPE_CHECKING:
    from moe_jax.ops.quantization import Format

Bits = Literal["fp8", "int8", "int4"]

_LARGEST = {"int8": 127, "int4": 7}
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
_ROWS = 256
"""Rows that are held in float32 at a time."""
_NOT_QUANTIZED = ["lm_head", r"re:.*\.gate$", r"re:.*eh_proj$"]
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_GROUP = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": True}


@dataclass(frozen=True)
class LowBits:
    """How a checkpoint's matrices are to be stored."""

    bits: Bits
    activations: bool = False
    """Also say that products are to round the activations, to 8 bits: with a scale per token, and with FP8 and int4 per
    block of inputs."""
    block: int = 128
    """"int4": inputs that share a scale, or so many of them that they divide every matrix's."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"block = {self.block}: must be at least 1")


class Form(NamedTuple):
    """What packed weights must have in common to be parts of one array."""

    format: Format
    group: int
    """Inputs that share a scale."""
    columns: int


class Packed(NamedTuple):
    """A weight as it is kept in memory (`ops.quantization.Quantized`, blocks of one row)."""

    values: np.ndarray
    """[..., R, C] int8, or E4M3's bits as uint8; of "int4" [..., R, ceil(C / 2)] uint8."""
    scales: np.ndarray
    """float32 [..., R, G]"""


# ------------------------------------------------------------------------------------------------------------- writing


def group_size(low_bits: LowBits, columns: set[int]) -> int | None:
    """Inputs that share a scale in all matrices, whose numbers of inputs are `columns`; None: all of them.

    The library's readers know the group from the shape of the scales alone, so it must divide every one.
    """
    return math.gcd(low_bits.block, *columns) if low_bits.bits == "int4" else None


def encoded(
    name: str, w_RC: np.ndarray, low_bits: LowBits, group: int | None, scale_dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that stand for a weight.

    Raises:
        ValueError: it has a NaN or an infinity.
    """
    if low_bits.bits == "fp8":
        values_RC, scale_inv_PQ = fp8.quantize_blocks(w_RC)
        yield name + fp8.SCALE_SUFFIX, scale_inv_PQ
        yield name, values_RC
        return
    values_RC, scales_RG = quantize_groups(w_RC, low_bits.bits, group or w_RC.shape[-1], scale_dtype)
    yield name + SCALE, scales_RG
    if low_bits.bits == "int8" and low_bits.activations:
        yield name, values_RC
        return
    yield name + PACKED, _in_words(values_RC, low_bits.bits)
    yield name + SHAPE, np.array(w_RC.shape, np.int64)


def quantize_groups(
    w_RC: np.ndarray, bits: Literal["int8", "int4"], group: int, scale_dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Weight [R, C] → (int8 values [R, C], scales [R, C / group]); the scale is max |w| / 127 or 7, as it is stored.

    Raises:
        ValueError: a weight is NaN or infinite, or C is no multiple of the group.
    """
    (R, C), largest = w_RC.shape, np.float32(_LARGEST[bits])
    if C % group:
        raise ValueError(f"{C} inputs are no multiple of the group of {group}")
    values_RC, scales_RG = np.empty((R, C), np.int8), np.empty((R, C // group), scale_dtype)
    for start in range(0, R, _ROWS):
        rows = slice(start, start + _ROWS)
        part = w_RC[rows].astype(np.float32).reshape(-1, C // group, group)
        amax = np.abs(part).max(axis=-1)
        if not np.isfinite(amax).all():
            raise ValueError(f"rows {start} to {start + _ROWS}: NaN or infinite weights have no {bits} form")
        scales_RG[rows] = np.maximum(amax / largest, np.finfo(np.float32).tiny)  # zeros have any scale
        part /= scales_RG[rows].astype(np.float32)[..., None]
        values_RC[rows] = np.clip(np.rint(part), -largest, largest).reshape(-1, C)
    return values_RC, scales_RG


def _in_words(values_RC: np.ndarray, bits: Literal["int8", "int4"]) -> np.ndarray:
    """int8 → int32 [R, ceil(C / 4)], or [R, ceil(C / 8)] of "int4"."""
    padded = np.pad(values_RC, ((0, 0), (0, -values_RC.shape[1] % 8))).view(np.uint8)
    if bits == "int8":
        padded = padded[:, : -(-values_RC.shape[1] // 4) * 4] ^ 0x80
    else:
        padded = ((padded[:, 0::2] & 0xF) | (padded[:, 1::2] << 4)) ^ 0x88
    return np.ascontiguousarray(padded).view("<i4")


def config_entry(low_bits: LowBits, group: int | None) -> dict[str, Any]:
    """config.json's `quantization_config`."""
    if low_bits.bits == "fp8":
        # The format itself says that activations are rounded; the further entry, which others pass over, that they are
        # here too.
        return fp8.QUANTIZATION_CONFIG | ({"input_activations": _GROUP} if low_bits.activations else {})
    weights = {"num_bits": int(low_bits.bits[3:]), "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    inputs = None
    if low_bits.activations:
        inputs = _TOKEN if group is None else _TOKEN | {"strategy": "group", "group_size": group}
    format = "int-quantized" if low_bits.bits == "int8" and low_bits.activations else "pack-quantized"
    scheme = {"weights": weights, "input_activations": inputs, "output_activations": None}
    scheme = {"targets": ["Linear"], "format": format, **scheme}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": _NOT_QUANTIZED,
    }


# ------------------------------------------------------------------------------------------------------------- reading


def inputs_format(config: Mapping[str, Any]) -> Format | None:
    """What a `quantization_config` says that products round the other operand of a weight to.

    Raises:
        ConfigError: it says something that is not understood; the message names the entry.
    """
    if not config:
        return None
    if config.get("quant_method") == "compressed-tensors":
        return _inputs_of_integers(config)
    known = fp8.QUANTIZATION_CONFIG | {"input_activations": _GROUP}
    for name, value in config.items():
        # scale_fmt (V3.1) says how scales were rounded when written, which their values show; the tensors show which
        # modules were not converted.
        if name not in ("scale_fmt", "modules_to_not_convert") and value != known.get(name):
            raise ConfigError(
                f"quantization_config.{name} = {value!r}: only DeepSeek-V3's FP8 is understood,"
                f" {fp8.QUANTIZATION_CONFIG}, and compressed-tensors' symmetric integers: convert the checkpoint to"
                " bfloat16"
            )
    return "e4m3" if config.get("input_activations") else None


def _inputs_of_integers(config: Mapping[str, Any]) -> Format | None:
    def refuse(name: str, value: Any, legal: str) -> ConfigError:
        return ConfigError(f"quantization_config.{name} = {value!r}: only {legal} is understood; convert to bfloat16")

    if config.get("format") not in ("pack-quantized", "int-quantized"):
        raise refuse("format", config.get("format"), "pack-quantized or int-quantized")
    groups = config.get("config_groups") or {}
    found = set()
    for name, scheme in groups.items():
        weights, inputs = scheme.get("weights") or {}, scheme.get("input_activations")
        legal = {"num_bits": (4, 8), "type": ("int",), "symmetric": (True,), "strategy": ("group", "channel")}
        for part, given, values in (("weights", weights, legal), ("input_activations", inputs, None)):
            if given is None:
                continue
            values = values or legal | {"num_bits": (8,), "strategy": ("token", "group"), "dynamic": (True,)}
            for entry, choices in values.items():
                if given.get(entry) not in choices:
                    raise refuse(
                        f"config_groups.{name}.{part}.{entry}", given.get(entry), " or ".join(map(str, choices))
                    )
        found.add("int8" if inputs else None)
    if len(found) != 1 or config.get("kv_cache_scheme"):
        raise refuse("config_groups", groups, "one treatment of activations for all, and no kv_cache_scheme,")
    return found.pop()


class Source(NamedTuple):
    """A weight in low bits in the files: their tensors."""

    values: np.ndarray
    """E4M3 or int8 [..., R, C]; int32 words [R, …]."""
    scales: np.ndarray
    """FP8's scale_inv [..., P, Q]; of integers [R, G]."""
    shape: tuple[int, ...]

    @property
    def form(self) -> Form:
        C = self.shape[-1]
        if self.values.dtype == fp8.FP8:
            return Form("e4m3", fp8.BLOCK, C)
        is_int4 = self.values.dtype == np.int32 and self.values.shape[1] == -(-C // 8)
        return Form("int4" if is_int4 else "int8", C // self.scales.shape[1], C)

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """float32 weights of a slice; those of FP8 are made of that part alone. Raises ValueError as `packed` does."""
        form = self.form
        if form.format == "e4m3":
            self._check_scales()
            return fp8.dequantize_blocks(self.values, self.scales, index)
        values, scales = self.packed()
        if form.format == "int4":
            nibbles = np.stack([values << 4, values & 0xF0], axis=-1).view(np.int8) >> 4
            values = nibbles.reshape(len(values), -1)[:, : form.columns]
        groups = values.astype(np.float32).reshape(*scales.shape, form.group) * scales[..., None]
        return groups.reshape(self.shape)[index]

    def packed(self) -> Packed:
        """The weight for `ops.packed_matmul`.

        Raises:
            ValueError: a scale is NaN, infinite or negative, or a value is NaN.
        """
        self._check_scales()
        (R, C), format = self.shape[-2:], self.form.format
        scales, data = self.scales.astype(np.float32), self.values.view(np.uint8)
        if format == "e4m3":
            if (data & 0x7F == 0x7F).any():
                raise ValueError("a value is NaN")
            return Packed(data, np.repeat(scales, fp8.BLOCK, axis=-2)[..., :R, :])
        if self.values.dtype == np.int8:
            return Packed(self.values, scales)
        if format == "int4":
            return Packed(data[:, : -(-C // 2)] ^ 0x88, scales)
        return Packed((data[:, :C] ^ 0x80).view(np.int8), scales)

    def _check_scales(self) -> None:
        if not (np.isfinite(self.scales) & (self.scales >= 0)).all():
            raise ValueError("a scale is NaN, infinite or negative")


def sources(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Source], set[str]]:
    """Weights in low bits among the tensors of files, and the names of the tensors that are parts of them.

    Raises:
        ValueError: a part is missing, or of another shape.
    """
    found: dict[str, Source] = {}
    parts: set[str] = set()
    for name, values in tensors.items():
        if name.endswith(PACKED) and name.removesuffix(PACKED) + SCALE in tensors:
            name = name.removesuffix(PACKED)
            shape = tuple(map(int, _part(name, SHAPE, tensors)))
            source = Source(values, tensors[name + SCALE], shape)
            parts |= {name + PACKED, name + SCALE, name + SHAPE}
            # Four inputs or fewer would not show how many bits each has.
            C = shape[1] if len(shape) == 2 else 0
            if C <= 4 or values.dtype != np.int32 or values.shape not in {(shape[0], -(-C // n)) for n in (4, 8)}:
                what = f"{values.dtype} {values.shape}"
                raise ValueError(f"{name + PACKED!r} is {what}, which does not hold {shape} numbers of 4 or 8 bits")
            _check_groups(name, source)
        elif values.dtype == np.int8 and name.endswith(".weight"):
            source = Source(values, _part(name, SCALE, tensors), values.shape)
            parts.add(name + SCALE)
            _check_groups(name, source)
        elif values.dtype == fp8.FP8:
            source = Source(values, _fp8_scales(name, tensors), values.shape)
            parts.add(name + fp8.SCALE_SUFFIX)
        else:
            continue
        found[name] = source
    return found, parts


def _part(name: str, suffix: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    if name + suffix not in tensors:
        raise ValueError(f"{name!r} is in low bits, but there is no {name + suffix!r}: export or download it again")
    return tensors[name + suffix]


def _check_groups(name: str, source: Source) -> None:
    R, C = source.shape
    shape = source.scales.shape
    if len(shape) != 2 or shape[0] != R or C % max(shape[1], 1):
        raise ValueError(f"{name + SCALE!r} has shape {shape}, which is not a scale per row and group of {(R, C)}")


def _fp8_scales(name: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    scales = tensors.get(name + fp8.SCALE_SUFFIX)
    if scales is None:
        raise ValueError(
            f"FP8 tensor {name!r} has no {name + fp8.SCALE_SUFFIX!r}; only DeepSeek's block-scaled FP8 is understood:"
            " convert the checkpoint to bfloat16"
        )
    shape = tensors[name].shape
    if len(shape) < 2 or scales.shape != fp8.scale_shape(shape):
        raise ValueError(
            f"{name + fp8.SCALE_SUFFIX!r} has shape {scales.shape}, which is not one scale per 128 x 128 block of"
            f" {shape}: convert the checkpoint to bfloat16"
        )
    return scales
