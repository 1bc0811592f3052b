"""Models from and to Hugging Face folders: config.json, safetensors, tokenizer, generation config, chat template.

B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, SingleDeviceSharding

from moe_jax.config import ConfigError, ModelConfig, MTPConfig
from moe_jax.data.tiktoken_files import TIKTOKEN_FILE
from moe_jax.data.tokenizer import HFTokenizer, Tokenizer, tokenizer_file
from moe_jax.interop.families import HARMLESS, Family, read_model_config, write_config
from moe_jax.interop.low_bits import Form, LowBits, config_entry, encoded, group_size, inputs_format
from moe_jax.interop.placement import extracted, packed_form, placed, placed_packed
from moe_jax.interop.tensor_names import Entry, chosen_layout, entries
from moe_jax.interop.weight_files import CheckpointFilesError, Encode, WeightFiles, write_folder
from moe_jax.model.definition import Arrays, Definition
from moe_jax.ops.quantization import Quantized

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", TIKTOKEN_FILE, "chat_template.jinja", "chat_template.json"),
)


class Output(NamedTuple):
    logits: Array
    """[B, S, V] float32."""


@dataclass(frozen=True)
class Pretrained:
    """A model with its weights and what lies beside them in its folder."""

    definition: Definition
    params: Arrays
    """Trained arrays by name, float32 unless `load_pretrained` was given a dtype; packed ones are `Quantized`."""
    rest: Arrays
    """Router biases, float32."""
    tokenizer: Tokenizer | None = None
    """None if the folder has neither tokenizer.json nor tiktoken.model."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json; {} if there is none."""
    folder: Path | None = None
    """Where it was loaded from; `save_pretrained` takes the tokenizer's files and the chat template from there."""

    @property
    def config(self) -> ModelConfig:
        return self.definition.cfg

    def __call__(self, tokens_BS: Any, segment_ids_BS: Any = None) -> Output:
        """The logits of whole sequences, compiled once per shape; `segment_ids_BS` is 0 at padding."""
        return Output(self._logits(self.params, self.rest, tokens_BS, segment_ids_BS))

    @functools.cached_property
    def _logits(self) -> Any:
        def logits(params: Arrays, rest: Arrays, tokens_BS: Array, segment_ids_BS: Array | None) -> Array:
            model = self.definition.merge(params, rest)
            return model.logits(model(tokens_BS, segment_ids_BS=segment_ids_BS).hidden_BSD)

        return jax.jit(logits)


def load_pretrained(
    path_or_repo: str | Path,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    *,
    packed: bool = False,
    verify: bool = True,
) -> Pretrained:
    """Loads a Hugging Face folder, or the repository `org/name` from the hub (extra `hub`).

    Tensors are read from the memory-mapped files one by one and written into the arrays on their devices, each device's
    part alone. Beyond the arrays themselves no more is held than one tensor of the checkpoint (of those in low bits, in
    float32), so that host memory does not depend on the model's size where devices have their own.

    Args:
        path_or_repo: the folder.
        mesh: where the weights lie (`sharding.make_mesh`); without one, on the default device.
        dtype: None: arrays float32, which training needs, and arithmetic (`config.dtype`) as the checkpoint's
            `torch_dtype` says, float16 becoming float32. "bfloat16" or "float32": both arrays and arithmetic, e.g.
            "bfloat16" for inference with DeepSeek-V3 in 1.3 TB. Router biases are float32 in any case.
        packed: keep weights that the files hold in 8 or 4 bits in these bits, for inference (`ops.packed_matmul`):
            DeepSeek-V3's FP8 in 0.7 TB. They become floats where they are used. On a mesh only experts are divided.
        verify: compare the weights' files with the folder's `SHA256SUMS` first, if it has them, as exports of
            `save_pretrained` do. Without, a changed byte in a tensor cannot be noticed.

    Raises:
        ConfigError: config.json is not understood (`families.read_model_config`), or there is no such folder and the
            hub does not give it.
        CheckpointFilesError: files or tensors are missing, of another shape, corrupt or not known.
        DataError: the tokenizer cannot be read.
    """
    folder, files, cfg, family = _opened(path_or_repo)
    generation = _read_json(folder / "generation_config.json")
    tokenizer = HFTokenizer(folder) if tokenizer_file(folder) else None
    if verify:
        files.verify(".safetensors")
    names = set(files.names)
    cfg = dataclasses.replace(cfg, dtype=dtype or cfg.dtype)
    definition = Definition.of(cfg)
    layout = list(entries(cfg, chosen_layout(family.layouts, cfg, names)))
    _check_tensors(definition, layout, files)

    by_array: dict[str, list[Entry]] = {name: [] for name in definition.variables}
    for entry in layout:
        if not entry.is_copy:
            by_array[entry.array].append(entry)
    params, rest = definition.shardings(mesh) if mesh else ({}, {})
    here = SingleDeviceSharding(jax.local_devices()[0])
    arrays = {}
    forms = _packed_forms(by_array, files, definition) if packed else {}
    inputs = inputs_format(_read_json(folder / "config.json").get("quantization_config") or {})
    for name, variable in definition.variables.items():
        if name in forms:
            arrays[name] = placed_packed(by_array[name], files, variable, mesh, forms[name], inputs)
            continue
        is_param = isinstance(variable, nnx.Param)
        sharding = (params if is_param else rest).get(name, here)
        stored = dtype if dtype and is_param else "float32"
        arrays[name] = placed(by_array[name], files, variable.shape, sharding, stored)
    params = {name: arrays.pop(name) for name in definition.param_names}
    return Pretrained(definition, params, arrays, tokenizer, generation, folder)


def _packed_forms(by_array: Mapping[str, list[Entry]], files: WeightFiles, definition: Definition) -> dict[str, Form]:
    """The arrays that can stay packed, and their forms: matrices of blocks; of experts both or neither."""
    forms = {}
    for name, variable in definition.variables.items():
        form = packed_form(by_array[name], files) if variable.get_metadata().get("roles") else None
        if form is not None:
            forms[name] = form
    pairs = [(f"{stack}.gate_up_ED2F", f"{stack}.down_EFD") for stack in {name.rpartition(".")[0] for name in forms}]
    alone = {name for pair in pairs for name in pair if not set(pair) <= forms.keys()}
    return {name: form for name, form in forms.items() if name not in alone}


def read_config(path_or_repo: str | Path) -> tuple[Path, ModelConfig]:
    """The folder of a checkpoint and the config of the model that `load_pretrained` would load from it, without it."""
    folder, _, cfg, _ = _opened(path_or_repo)
    return folder, cfg


def _opened(path_or_repo: str | Path) -> tuple[Path, WeightFiles, ModelConfig, Family]:
    folder = _folder(path_or_repo)
    cfg, family = read_model_config(folder / "config.json")
    files = WeightFiles(folder)
    return folder, files, dataclasses.replace(cfg, mtp=_mtp_in_files(cfg, set(files.names), folder)), family


def _folder(path_or_repo: str | Path) -> Path:
    folder, name = Path(path_or_repo), str(path_or_repo)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ConfigError(f"{name!r} is neither a folder nor a repository `org/name`: give a folder with config.json")
    remedy = f"download it elsewhere, `hf download {name} --local-dir DIR`, and give DIR"
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"no folder {name!r}, and repositories need the extra `hub`, `pip install moe_jax[hub]`; or {remedy}"
        ) from error
    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=5)
        names = [file.rfilename for file in info.siblings or ()]
        wanted = _wanted(name, names)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, etag_timeout=5))
    except ConfigError:
        raise
    except Exception as error:  # whatever the library's HTTP client raises
        raise ConfigError(f"no folder {name!r}, and the hub does not give it ({error}): {remedy}") from error


def _wanted(repository: str, names: Sequence[str]) -> list[str]:
    """Which files of a repository are read here; its weights may be there a second time, in other formats or folders.

    Raises:
        ConfigError: none of them are safetensors.
    """
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if not weights:
        pickles = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        raise ConfigError(
            f"{repository} has {'PyTorch pickles (*.bin) only' if pickles else 'no safetensors files'}: nothing was"
            " downloaded. Convert it, for instance by transformers' AutoModelForCausalLM.from_pretrained"
            f"({repository!r}).save_pretrained(DIR) and the same with AutoTokenizer, and give DIR"
        )
    named = [name for name in weights if name.startswith("model")]  # Mistral's has all again as consolidated
    others = [name for name in names if "/" not in name and (name.endswith(".json") or name in TOKENIZER_FILES)]
    return [*(named or weights), *others]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointFilesError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointFilesError(f"{path} must hold a JSON object, not {type(value).__name__}: download it again")
    return value


def _mtp_in_files(cfg: ModelConfig, names: Container[str], folder: Path) -> MTPConfig:
    """transformers drops these modules when it saves a model, and leaves their number in the config."""
    if cfg.mtp.depth and f"model.layers.{cfg.num_layers}.eh_proj.weight" not in names:
        message = f"{folder}: num_nextn_predict_layers = {cfg.mtp.depth}, but the files have no such weights: left out"
        warnings.warn(message, stacklevel=4)
        return dataclasses.replace(cfg.mtp, depth=0)
    return cfg.mtp


def _check_tensors(definition: Definition, layout: list[Entry], files: WeightFiles) -> None:
    """Every tensor is there, has the shape that the config says, and is one that the model has."""
    unknown = {name for name in files.names if not name.endswith("rotary_emb.inv_freq")}  # old; found from the config
    main = {entry.array: entry.tensor for entry in layout if not entry.is_copy}
    for entry in layout:
        if entry.tensor not in unknown and not entry.is_copy:
            raise CheckpointFilesError(f"{files.folder}: tensor {entry.tensor!r} is missing: config.json asks for it")
        if entry.tensor not in unknown:
            continue
        expected = entry.tensor_shape(definition.variables[entry.array].shape)
        if tuple(files.shape(entry.tensor)) != expected:
            raise CheckpointFilesError(
                f"{files.folder}: tensor {entry.tensor!r} has shape {tuple(files.shape(entry.tensor))}, config.json"
                f" says {expected}: the two are of different models"
            )
        if entry.is_copy:
            _check_same(entry.tensor, main[entry.array], files)
        unknown.remove(entry.tensor)
    if definition.cfg.tie_word_embeddings and "lm_head.weight" in unknown:
        _check_same("lm_head.weight", main["embed_VD"], files)
        unknown.remove("lm_head.weight")
    if unknown:
        raise CheckpointFilesError(
            f"{files.folder}: {len(unknown)} tensors that config.json does not account for, such as {min(unknown)!r}"
        )


def _check_same(copy: str, name: str, files: WeightFiles) -> None:
    if not np.array_equal(files.read(copy), files.read(name)):
        raise CheckpointFilesError(f"{files.folder}: tensor {copy!r} should equal {name!r} and does not")


def save_pretrained(
    model: Pretrained,
    path: str | Path,
    *,
    dtype: str | None = None,
    low_bits: LowBits | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face folder that transformers loads: all of it or nothing, one tensor in memory at a time.

    In a run of several processes all must call it: each takes part in gathering the tensors, the first one writes, and
    none returns before the folder is there.

    The tokenizer's files and the chat template are copied from the folder of `model.tokenizer`, token ids and other
    fields that do not describe the architecture from the config.json in `model.folder`. Experts are written as one
    tensor each, which every version of transformers reads.

    Args:
        model: weights may lie on a mesh.
        path: must not exist yet, or be empty.
        dtype: "float32" or "bfloat16" tensors; None: as `model.config.dtype`. Router biases are float32 in any case.
        low_bits: store matrices of blocks in 8 or 4 bits (`interop.low_bits`); norms, routers, embeddings, head and the
            prediction modules' eh_proj stay as they are, as in DeepSeek-V3's release. transformers 5.23 reads FP8 where
            the matrices' sides are up to 128 or multiples of it.
        max_shard_bytes: size of a safetensors file.

    Raises:
        ConfigError: no family of Hugging Face's computes what the model does.
        CheckpointFilesError: the folder is not empty, the disk is full; with `low_bits`, a weight is NaN or infinite.
        ValueError: the model's weights are packed: quantising again would add to the error.
    """
    if any(isinstance(array, Quantized) for array in model.params.values()):
        raise ValueError("the model's weights are packed: load it without `packed`")
    dtype = dtype or model.config.dtype
    original = _read_json(model.folder / "config.json") if model.folder else {}
    config, family = write_config(model.config, original.get("model_type"))
    kept = {name: value for name, value in original.items() if name in (*HARMLESS, *family.harmless)}
    if model.tokenizer is not None:
        kept = {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": model.tokenizer.eos_id} | kept
    for name in ("dtype", "_name_or_path", "transformers_version", "auto_map"):
        kept.pop(name, None)
    config = {**kept, **config, "torch_dtype": dtype}
    encode = None
    if low_bits is not None:
        encode, config["quantization_config"] = _encoding(model.definition, family, low_bits, dtype)

    arrays = {**model.params, **model.rest}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for entry in entries(model.config, family.layouts[0]):
            is_param = entry.array in model.params
            yield entry.tensor, extracted(arrays[entry.array], entry, dtype if is_param else "float32")

    files: dict[str, str | bytes] = {"config.json": json.dumps(config, indent=2) + "\n"}
    if model.generation:
        files["generation_config.json"] = json.dumps(model.generation, indent=2) + "\n"
    if isinstance(model.tokenizer, HFTokenizer):
        files |= _tokenizer_files(model.tokenizer)
    gathered = tensors()
    with _written_by_the_first(path, gathered) as is_first:
        if is_first:
            write_folder(path, gathered, files, max_shard_bytes=max_shard_bytes, encode=encode)


def _encoding(definition: Definition, family: Family, low_bits: LowBits, dtype: str) -> tuple[Encode, dict[str, Any]]:
    """How tensors are stored, and config.json's entry about it."""
    columns = {}
    for entry in entries(definition.cfg, family.layouts[0]):
        variable = definition.variables[entry.array]
        # DeepSeek's README says which weights are in FP8; of eh_proj it is not known.
        if variable.get_metadata().get("roles") and not entry.tensor.endswith("eh_proj.weight") and not entry.is_copy:
            columns[entry.tensor] = entry.tensor_shape(variable.shape)[-1]
    group = group_size(low_bits, set(columns.values()))

    def encode(name: str, tensor: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
        if name in columns:
            return encoded(name, tensor, low_bits, group, jnp.dtype(dtype))
        if not np.isfinite(tensor).all():
            raise ValueError("NaN or infinite weights: there is no model to quantise")
        return [(name, tensor)]

    return encode, config_entry(low_bits, group)


@contextmanager
def _written_by_the_first(path: str | Path, gathered: Iterator[Any]) -> Iterator[bool]:
    """Whether this process is the one that writes; at the end all have gathered all, and know whether it could."""
    if jax.process_count() == 1:
        yield True
        return
    from jax.experimental import multihost_utils

    failure = None
    try:
        yield jax.process_index() == 0
    except Exception as error:
        failure = error
    for _ in gathered:  # what is left of it: the others wait in every gather
        pass
    failed = multihost_utils.broadcast_one_to_all(np.bool_(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointFilesError(f"{path}: process 0 could not write it; its message says why")


def _tokenizer_files(tokenizer: HFTokenizer) -> dict[str, str | bytes]:
    """The files of its folder; with a tokenizer.json if there is none, since without code nothing else reads those."""
    beside = tokenizer.file.parent
    files: dict[str, str | bytes] = {
        name: (beside / name).read_bytes() for name in TOKENIZER_FILES if (beside / name).is_file()
    }
    if tokenizer.file.name == TIKTOKEN_FILE:
        config = _read_json(beside / "tokenizer_config.json")
        config.pop("auto_map", None)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        files["tokenizer.json"] = tokenizer.to_json()
    return files
