"""Checkpoints of Hugging Face transformers 5.23.0 loaded here give the logits that it gave, and go back unchanged.

`checkpoints/` holds them (see `make_reference.py`), so that no PyTorch is needed; tests with `transformers` in their
names are live, and are skipped where it is not installed. Half of the positions lie past the original context of YaRN
and Llama 3 scaling, and one row is padded on the left.

B batch, S sequence, V vocabulary.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import shutil
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, MeshConfig, ModelConfig, MoEConfig, RoPEConfig
from moe_jax.data import DataError
from moe_jax.data.tokenizer import HFTokenizer
from moe_jax.interop.fp8 import QUANTIZATION_CONFIG
from moe_jax.interop.low_bits import LowBits
from moe_jax.interop.placement import placed
from moe_jax.interop.pretrained import Pretrained, load_pretrained, save_pretrained
from moe_jax.interop.tensor_names import FUSED_EXPERTS, entries
from moe_jax.interop.weight_files import CheckpointFilesError, WeightFiles, write_folder
from moe_jax.model.definition import Definition
from moe_jax.model.transformer import make_cache
from moe_jax.sharding import make_mesh

CHECKPOINTS = pathlib.Path(__file__).with_name("checkpoints")
TIKTOKEN = pathlib.Path(__file__).parents[1] / "data" / "tiktoken"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
FUSED = [name for name in NAMES if (CHECKPOINTS / name / "fused.safetensors").exists()]
TOLERANCE = 2e-5
"""Of the largest value; float32 noise is ten times smaller."""

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
load = functools.cache(lambda name: load_pretrained(CHECKPOINTS / name))


@functools.cache
def reference(name):
    with np.load(CHECKPOINTS / name / "reference.npz") as file:
        arrays = dict(file)
    return arrays | {"tokens_BS": arrays["tokens_BS"].astype(np.int32)}


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def tensors(folder):
    files = WeightFiles(folder)
    return {name: files.read(name) for name in files.names}


def families(*quick):
    """All of them; those that are made of parts of the quick ones are slow tests."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in NAMES]


@pytest.mark.parametrize("name", families(*{*NAMES} - {"deepseek_v2_lite", "qwen3_moe", "llama"}))
def test_logits(name):
    stored, valid_BS = reference(name), reference(name)["valid_BS"]
    logits_BSV = np.asarray(load(name)(stored["tokens_BS"], valid_BS.astype(np.int32)).logits)
    assert_close(logits_BSV[valid_BS], stored["logits_BSV"][valid_BS])


@pytest.mark.parametrize("name", families("deepseek_v3", "qwen3"))
def test_cached_decoding(name):
    """Prefill, then a token at a time, gives the logits of the whole sequence; past the original context, too."""
    stored, valid_BS = reference(name), reference(name)["valid_BS"]
    model = load(name)
    B, S = valid_BS.shape

    @functools.partial(jit, static_argnames="prefill")
    def step(params, rest, tokens_BS, segment_ids_BS, cache, prefill):
        transformer = model.definition.merge(params, rest)
        output = transformer(tokens_BS, segment_ids_BS=segment_ids_BS, cache=cache, prefill=prefill)
        return transformer.logits(output.hidden_BSD), output.cache

    cache, parts = make_cache(model.config, B, S + 3), []
    for start, stop in itertools.pairwise([0, *range(20, S + 1)]):
        part = stored["tokens_BS"][:, start:stop], valid_BS[:, start:stop].astype(np.int32)
        logits_BSV, cache = step(model.params, model.rest, *part, cache, prefill=start == 0)
        parts.append(logits_BSV)
    assert_close(np.concatenate(parts, axis=1)[valid_BS], stored["logits_BSV"][valid_BS])


def test_multi_token_prediction():
    """Both modules' hidden states, chained: [embedding; hidden], from the trunk's output after the final norm."""
    stored, model = reference("deepseek_v3"), load("deepseek_v3")
    tokens_1S = stored["tokens_BS"][:1]
    positions_1S = np.arange(tokens_1S.shape[1])[None]

    @jit
    def predict_ahead(params, rest, tokens_1S):
        transformer = model.definition.merge(params, rest)
        hidden_1SD = transformer(tokens_1S).hidden_BSD
        return transformer.predict_ahead(hidden_1SD, tokens_1S, jnp.ones_like(tokens_1S), positions_1S).hidden_NBSD

    hidden_N1SD = np.asarray(predict_ahead(model.params, model.rest, tokens_1S))
    assert len(hidden_N1SD) == 2
    for k, hidden_1SD in enumerate(hidden_N1SD):
        assert_close(hidden_1SD[:, : -(k + 1)], stored[f"mtp_hidden_{k}"])


@pytest.mark.parametrize("name", NAMES)
def test_export_is_bit_equal(name, tmp_path):
    """The same tensors under the same names; the config says the same to us, the weights too."""
    model = load(name)
    save_pretrained(model, tmp_path / "export")
    ours, theirs = tensors(tmp_path / "export"), tensors(CHECKPOINTS / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
    again = load_pretrained(tmp_path / "export")
    assert again.config == model.config
    original, exported = (
        json.loads((folder / "config.json").read_text()) for folder in (CHECKPOINTS / name, tmp_path / "export")
    )
    renamed = {"dtype", "transformers_version", "rope_parameters", "num_local_experts"}
    assert original.keys() - exported.keys() <= renamed


@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_load(name, tmp_path):
    """One tensor for all experts of a layer, as transformers' modules hold them, gives the same arrays."""
    shutil.copy(CHECKPOINTS / name / "config.json", tmp_path)
    shutil.copy(CHECKPOINTS / name / "fused.safetensors", tmp_path / "model.safetensors")
    # What transformers holds, and so this file, is without prediction modules.
    with pytest.warns(UserWarning) if name == "deepseek_v3" else nullcontext():
        model = load_pretrained(tmp_path)
    whole = load(name)
    arrays, expected = {**model.params, **model.rest}, {**whole.params, **whole.rest}
    assert arrays.keys() == {key for key in expected if not key.startswith("mtp.")}
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, expected[key], err_msg=key)


def test_every_sparse_family_has_both_layouts():
    sparse = {name for name in NAMES if load(name).config.moe.num_experts}
    assert sparse - set(FUSED) == {"deepseek_moe"}  # which has no class in transformers


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path):
    """Its code is DeepSeek-V3's, and nobody else knows its name: it is exported under the other."""
    folder = CHECKPOINTS / "deepseek_v3_no_groups"
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "kimi_k2"}
    config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "model.safetensors", tmp_path)
    shutil.copytree(TIKTOKEN, tmp_path, dirs_exist_ok=True)
    model = load_pretrained(tmp_path)
    assert model.config == load("deepseek_v3_no_groups").config
    assert model.tokenizer is not None and model.tokenizer.has_chat_template
    save_pretrained(model, tmp_path / "export")
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    assert exported["model_type"] == "deepseek_v3" and "auto_map" not in exported


def test_an_export_of_a_tiktoken_model_has_a_tokenizer_json(tmp_path):
    tokenizer = HFTokenizer(TIKTOKEN)
    save_pretrained(dataclasses.replace(load("deepseek_v3_no_groups"), tokenizer=tokenizer), tmp_path / "export")
    (tmp_path / "export" / "tiktoken.model").unlink()
    again = load_pretrained(tmp_path / "export").tokenizer
    assert isinstance(again, HFTokenizer) and again.file.name == "tokenizer.json"
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    message = [{"role": "user", "content": "专家 12345 aaaa"}]
    assert again.apply_chat_template(message) == tokenizer.apply_chat_template(message)
    assert again.encode(again.apply_chat_template(message)) == tokenizer.encode(again.apply_chat_template(message))


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("generation_config.json", "{", CheckpointFilesError),
        ("generation_config.json", "[]", CheckpointFilesError),
        ("tokenizer.json", "{}", DataError),
    ],
)
def test_damaged_files_beside_the_weights(file, content, error, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(CHECKPOINTS / "qwen2" / name, tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(error, match=file):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("layout", ["separate", "fused"])
def test_every_device_gets_its_shard(layout, tmp_path):
    folder = CHECKPOINTS / "deepseek_v2"
    if layout == "fused":
        shutil.copy(folder / "config.json", tmp_path)
        shutil.copy(folder / "fused.safetensors", tmp_path / "model.safetensors")
        folder = tmp_path
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    model, whole = load_pretrained(folder, mesh), load("deepseek_v2")
    gate_up = model.params["moe_blocks.ffn.experts.gate_up_ED2F"]
    assert gate_up.addressable_shards[0].data.shape == (2, 4, 8, 2, 3)
    for name, array in whole.params.items():
        np.testing.assert_array_equal(model.params[name], array, err_msg=name)
    save_pretrained(model, tmp_path / "export")
    theirs = tensors(CHECKPOINTS / "deepseek_v2")
    for name, tensor in tensors(tmp_path / "export").items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def test_devices_with_their_own_memory(tmp_path):
    """Pieces written on the device, as accelerators need it, make the same array as the host's memory."""
    shutil.copy(CHECKPOINTS / "deepseek_v2" / "fused.safetensors", tmp_path / "model.safetensors")
    files, definition = WeightFiles(tmp_path), load("deepseek_v2").definition
    params, _ = definition.shardings(make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=1)))
    for name in ("moe_blocks.ffn.experts.gate_up_ED2F", "moe_blocks.attention.query_b"):
        own = [entry for entry in entries(definition.cfg, FUSED_EXPERTS) if entry.array == name]
        array = placed(own, files, definition.variables[name].shape, params[name], "float32", on_host=False)
        assert array.sharding == params[name]
        np.testing.assert_array_equal(array, load("deepseek_v2").params[name])


@pytest.mark.parametrize(("dtype", "stored", "arithmetic"), [(None, "float32", "bfloat16"), ("bfloat16",) * 3])
def test_dtypes(dtype, stored, arithmetic, tmp_path):
    """A bfloat16 checkpoint: what arrays are stored in, what is computed in, and what an export has."""
    save_pretrained(load("deepseek_v3_no_groups"), tmp_path / "bfloat16", dtype="bfloat16")
    model = load_pretrained(tmp_path / "bfloat16", dtype=dtype)
    assert {array.dtype.name for array in model.params.values()} == {stored}
    assert {array.dtype.name for array in model.rest.values()} == {"float32"}
    assert model.config.dtype == arithmetic
    save_pretrained(model, tmp_path / "again")
    first, second = tensors(tmp_path / "bfloat16"), tensors(tmp_path / "again")
    for name in first:
        assert second[name].dtype.name == ("float32" if name.endswith("correction_bias") else "bfloat16")
        np.testing.assert_array_equal(first[name], second[name])


def test_fp8(tmp_path):
    """Written in FP8 and read again, whole and on a mesh: matrices within half a step of E4M3, the rest unchanged."""
    save_pretrained(load("deepseek_v3"), tmp_path / "fp8", low_bits=LowBits("fp8"))
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"] == QUANTIZATION_CONFIG
    model = load_pretrained(tmp_path / "fp8")
    ours, theirs = tensors(tmp_path / "fp8"), tensors(CHECKPOINTS / "deepseek_v3")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # DeepSeek's README_WEIGHTS.md: all but norms, router, embeddings and head; of eh_proj it says nothing.
        quantized = re.search(r"\.(?!eh_proj\.)(\w+_proj|kv_a_proj_with_mqa)\.weight$", name) is not None
        assert np.array_equal(ours[name], tensor) != quantized, name
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=np.abs(tensor).max() / 27.9)
    on_mesh = load_pretrained(tmp_path / "fp8", make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2)))
    for name, array in model.params.items():
        np.testing.assert_array_equal(on_mesh.params[name], array, err_msg=name)
    save_pretrained(model, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"), "o_proj.weight' is missing"),
        (lambda t: t.update({"model.layers.1.self_attn.o_proj.bias": np.ones(16, np.float32)}), "o_proj.bias"),
        (lambda t: t.update({"model.norm.weight": np.ones(8, np.float32)}), r"norm.weight' has shape \(8,\)"),
        (lambda t: t.update({"lm_head.weight": np.ones((24, 16), np.float32)}), "lm_head.weight' should equal"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message, tmp_path):
    changed = tensors(CHECKPOINTS / "qwen2")
    change(changed)
    config = (CHECKPOINTS / "qwen2" / "config.json").read_text()
    write_folder(tmp_path / "changed", changed.items(), {"config.json": config})
    with pytest.raises(CheckpointFilesError, match=message):
        load_pretrained(tmp_path / "changed")


def test_missing_prediction_modules_are_left_out(tmp_path):
    """transformers drops them when it saves a model and keeps their number in the config."""
    kept = {name: tensor for name, tensor in tensors(CHECKPOINTS / "deepseek_v3").items() if "layers.3." not in name}
    kept = {name: tensor for name, tensor in kept.items() if "layers.4." not in name}
    config = (CHECKPOINTS / "deepseek_v3" / "config.json").read_text()
    write_folder(tmp_path / "main", kept.items(), {"config.json": config})
    with pytest.warns(UserWarning, match="num_nextn_predict_layers = 2"):
        model = load_pretrained(tmp_path / "main")
    assert model.config.mtp.depth == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "deepseek_moe"])  # no class in transformers
def test_transformers_loads_the_export(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    save_pretrained(load(name), tmp_path / "export")
    stored, valid_BS = reference(name), reference(name)["valid_BS"]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(".layers.3." in key or ".layers.4." in key for key in info["unexpected_keys"])  # MTP modules
    positions_BS = np.maximum(np.cumsum(valid_BS, axis=1) - 1, 0)
    with torch.no_grad():
        inputs = (torch.tensor(x) for x in (stored["tokens_BS"], valid_BS.astype(np.int64), positions_BS))
        tokens_BS, mask_BS, positions_BS = inputs
        logits_BSV = model(tokens_BS.long(), attention_mask=mask_BS, position_ids=positions_BS).logits.numpy()
    assert_close(logits_BSV[valid_BS], stored["logits_BSV"][valid_BS])  # stored by PyTorch on another kind of CPU


@pytest.mark.slow
def test_transformers_loads_fp8(tmp_path):
    """It dequantises (on CPUs it has no FP8 products) to our weights, bit for bit, and gives our logits.

    Sides are up to 128 or multiples of it: transformers 5.23 takes the rows of a weight over those of its scales for
    the size of a block, which is wrong where the last block is cut off (and not whole for DeepSeek-V3's own
    kv_a_proj_with_mqa, 576 rows in 5 blocks, which it refuses).
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rope = RoPEConfig(layout="interleaved")
    attention = AttentionConfig(num_heads=4, kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32, rope=rope)
    attention = dataclasses.replace(attention, q_lora_rank=128, v_head_dim=64)
    moe = MoEConfig(num_experts=4, num_shared_experts=1, expert_size=128)
    cfg = ModelConfig(num_layers=2, hidden_size=256, intermediate_size=384, attention=attention, moe=moe)
    definition = Definition.of(cfg)
    params, rest = definition.init(jax.random.key(0))
    save_pretrained(Pretrained(definition, params, rest), tmp_path / "fp8", low_bits=LowBits("fp8"))
    ours = load_pretrained(tmp_path / "fp8")
    tokens_BS = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 16))
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "output_loading_info": True}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits_BSV = theirs(torch.tensor(tokens_BS)).logits.numpy()
    assert_close(np.asarray(ours(tokens_BS).logits), logits_BSV)
    held = theirs.state_dict()
    for name, tensor in tensors(tmp_path / "fp8").items():
        if ".mlp.experts." not in name:  # which it holds fused; the logits depend on them
            np.testing.assert_array_equal(held[name].numpy(), tensor, err_msg=name)


@pytest.mark.slow
def test_transformers_reads_the_tokenizer_of_a_tiktoken_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = HFTokenizer(TIKTOKEN)
    save_pretrained(dataclasses.replace(load("deepseek_v3_no_groups"), tokenizer=tokenizer), tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for entry in json.loads((TIKTOKEN / "reference.json").read_text()):
        assert theirs.encode(entry["text"], add_special_tokens=False) == entry["ids"]
    message = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(message, tokenize=False) == tokenizer.apply_chat_template(message)


def test_a_changed_byte_in_the_weights_is_noticed(tmp_path):
    save_pretrained(load("qwen2"), tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointFilesError, match=r"model.safetensors: SHA-256"):
        load_pretrained(tmp_path / "export")
    load_pretrained(tmp_path / "export", verify=False)
