"""Checkpoints in 8 and 4 bits: the layout in files, packed loading, generation that stays packed, and what is refused.

R rows (outputs), C columns (inputs).
"""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.config import (
    AttentionConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RoPEConfig,
    SamplingConfig,
)
from moe_jax.interop import low_bits
from moe_jax.interop.low_bits import LowBits, encoded, group_size, quantize_groups, sources
from moe_jax.interop.pretrained import Pretrained, load_pretrained, save_pretrained
from moe_jax.interop.weight_files import CheckpointFilesError, WeightFiles, _open_shard, write_folder
from moe_jax.model.definition import Definition
from moe_jax.ops import packed_matmul
from moe_jax.ops.quantization import Quantized, dequantize
from moe_jax.sampling.sampler import generate, pad_prompts
from moe_jax.sharding import make_mesh

ALL = [LowBits("fp8"), LowBits("int8"), LowBits("int8", True), LowBits("int4", block=16), LowBits("int4", True)]
MLA_MOE = ModelConfig(
    vocab_size=48,
    hidden_size=64,
    num_layers=3,
    intermediate_size=96,
    first_k_dense=1,
    max_position=64,
    initializer_range=0.1,
    attention=AttentionConfig(
        num_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
    ),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, num_shared_experts=1, expert_size=48),
    mtp=MTPConfig(depth=1),
)
DENSE = ModelConfig(
    vocab_size=48,
    hidden_size=64,
    num_layers=2,
    intermediate_size=160,
    max_position=64,
    initializer_range=0.1,
    attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=16, rope=RoPEConfig(theta=1e4)),
)
TOKENS = np.random.default_rng(0).integers(2, 48, (2, 12)).astype(np.int32)


@functools.cache
def model(cfg):
    definition = Definition.of(cfg)
    return Pretrained(definition, *definition.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @functools.cache
    def saved(cfg, bits):
        path = tmp_path_factory.mktemp("low_bits") / "m"
        save_pretrained(model(cfg), path, low_bits=bits)
        return path

    return saved


# ---------------------------------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_what_the_format_s_description_says(bits):
    """compressed-tensors' pack-quantized: number c of a row is in bits c · n and up of its word, from the lowest on."""
    w = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    values, scales = quantize_groups(w, f"int{bits}", 10, ml_dtypes.bfloat16)
    stored = dict(encoded("x.weight", w, LowBits(f"int{bits}"), 10, ml_dtypes.bfloat16))
    assert sorted(stored) == ["x.weight_packed", "x.weight_scale", "x.weight_shape"]
    words, per_word = stored["x.weight_packed"], 32 // bits
    assert words.dtype == np.int32 and words.shape == (3, -(-20 // per_word))
    np.testing.assert_array_equal(stored["x.weight_shape"], [3, 20])
    np.testing.assert_array_equal(stored["x.weight_scale"], scales)
    for r in range(3):
        for c in range(20):
            number = (int(words[r, c // per_word]) >> bits * (c % per_word)) & (2**bits - 1)
            assert number - 2 ** (bits - 1) == values[r, c]
            error = abs(w[r, c] - values[r, c] * float(scales[r, c // 10]))
            assert error <= 0.51 * float(scales[r, c // 10])
    found, parts = sources(stored)
    assert parts == set(stored) and found["x.weight"].form == (f"int{bits}", 10, 20)
    want = values * np.repeat(scales.astype(np.float32), 10, axis=1)
    np.testing.assert_array_equal(found["x.weight"].read(), want)
    np.testing.assert_array_equal(found["x.weight"].read((slice(1, 3), slice(None, None, 2))), want[1:3, ::2])


@pytest.mark.parametrize("value", [0.0, 1e-44, 3e38])
@pytest.mark.parametrize("bits", ["fp8", "int8", "int4"])
def test_zeros_and_extreme_weights(bits, value):
    """Zeros come back as zeros, through scales of the smallest number; nothing divides by zero or overflows."""
    w = np.full((4, 8), value, np.float32)
    w[1] = 1
    found, _ = sources(dict(encoded("x.weight", w, LowBits(bits), 8, np.float32)))
    np.testing.assert_allclose(found["x.weight"].read()[2:], value, rtol=1e-6, atol=1e-37)
    assert np.isfinite(found["x.weight"].read()).all()


def test_a_group_divides_the_inputs_of_every_matrix():
    assert group_size(LowBits("int4"), {256, 1408}) == 128 and group_size(LowBits("int4"), {256, 10944}) == 64
    assert group_size(LowBits("int4", block=32), {96}) == 32 and group_size(LowBits("int8"), {96}) is None
    with pytest.raises(ValueError, match="10 inputs are no multiple of the group of 4"):
        quantize_groups(np.ones((2, 10)), "int4", 4, np.float32)
    with pytest.raises(ConfigError, match="block = 0"):
        LowBits("int4", block=0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="pip install compressed-tensors")
@pytest.mark.parametrize("bits", ALL[1:])
def test_transformers_and_compressed_tensors_read_it(folder, bits):
    """Seen with transformers 5.24 and compressed-tensors 0.20: equal to 6e-7 where activations are left alone; where
    they are not, its rounding of them differs from ours by as much as each from none."""
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder(DENSE, bits))
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS).long()).logits.float().numpy()
    ours = np.asarray(load_pretrained(folder(DENSE, bits), packed=True)(TOKENS).logits)
    assert np.linalg.norm(logits - ours) < (0.05 if bits.activations else 1e-5) * np.linalg.norm(ours)


# ------------------------------------------------------------------------------------------------------ packed loading


@pytest.mark.parametrize("cfg", [MLA_MOE, DENSE], ids=["mla-moe", "dense"])
@pytest.mark.parametrize("bits", ALL, ids=str)
def test_packed_weights_compute_what_their_floats_compute(folder, cfg, bits):
    path = folder(cfg, bits)
    packed, floats = load_pretrained(path, packed=True), load_pretrained(path)
    for name, array in packed.params.items():
        variable = packed.definition.variables[name]
        roles = variable.get_metadata().get("roles")
        kept = not roles or name == "mtp.projection_N2DD"
        assert isinstance(array, Quantized) is not kept, name
        if kept:
            np.testing.assert_array_equal(array, floats.params[name])
            continue
        stands_for = np.moveaxis(np.asarray(dequantize(array)), -1, array.ndim - roles.count("o") - 1)
        np.testing.assert_array_equal(stands_for.reshape(variable.shape), floats.params[name])
        numbers = int(np.prod(variable.shape))
        assert array.values.nbytes == (numbers // 2 if bits.bits == "int4" else numbers)
        assert array.inputs == ({"fp8": "e4m3"}.get(bits.bits, "int8") if bits.activations else None)
    if not bits.activations:
        np.testing.assert_allclose(packed(TOKENS).logits, floats(TOKENS).logits, rtol=1e-4, atol=1e-4)
    exact = np.asarray(model(cfg)(TOKENS).logits)
    bound = {"fp8": 0.3, "int8": 0.2, "int4": 0.8}[bits.bits]
    assert 0 < np.linalg.norm(packed(TOKENS).logits - exact) < bound * np.linalg.norm(exact)


def test_experts_are_divided_over_a_mesh(folder):
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    one, many = load_pretrained(folder(MLA_MOE, ALL[0]), packed=True), None
    with jax.set_mesh(mesh):
        many = load_pretrained(folder(MLA_MOE, ALL[0]), mesh, packed=True)
        experts = many.params["moe_blocks.ffn.experts.down_EFD"]
        assert experts.values.addressable_shards[0].data.shape[1] == 1
        logits = many(np.repeat(TOKENS, 4, axis=0)).logits
    np.testing.assert_allclose(logits, np.repeat(one(TOKENS).logits, 4, axis=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cfg", [MLA_MOE, DENSE], ids=["mla-moe", "dense"])
def test_generation_keeps_weights_packed(folder, cfg, monkeypatch):
    """All temporaries of a compiled generation, its copies of packed layers among them, take less than half of what the
    matrices' floats would; with the floats made first they take more than those."""
    monkeypatch.setattr(packed_matmul, "_CHUNK_NUMBERS", 2**9)
    path = folder(cfg, ALL[3])
    packed, floats = load_pretrained(path, packed=True), load_pretrained(path)
    prompt = pad_prompts([[5, 6, 7]], 0)

    def tokens(params, rest):
        sampling = SamplingConfig(max_new_tokens=6)
        drawn = generate(
            packed.definition.merge(params, rest), *prompt, jax.random.key(0), sampling, stop_ids=(1,), pad_id=0
        )
        return drawn.tokens_BN

    compiled = jax.jit(tokens).lower(packed.params, packed.rest).compile()
    matrices = [name for name, array in packed.params.items() if isinstance(array, Quantized)]
    float_bytes = sum(floats.params[name].nbytes for name in matrices)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * float_bytes
    np.testing.assert_array_equal(compiled(packed.params, packed.rest), jax.jit(tokens)(floats.params, floats.rest))

    def of_floats(params, rest):
        whole = {name: jnp.reshape(dequantize(params[name]), floats.params[name].shape) for name in matrices}
        return tokens({**params, **whole}, rest)

    compiled = jax.jit(of_floats).lower(packed.params, packed.rest).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > float_bytes


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("bits", ALL[:2] + ALL[3:4], ids=str)
@pytest.mark.parametrize("name", ["dense_blocks.ffn.down_FD", "norm.weight"])
def test_a_model_with_nan_is_refused_with_the_tensor_s_name(tmp_path, bits, name):
    whole = model(DENSE)
    params = {**whole.params, name: whole.params[name].at[..., 3].set(jnp.nan)}
    theirs = {"norm.weight": "model.norm.weight"}.get(name, "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(CheckpointFilesError, match=f"'{theirs}'.*NaN or infinite"):
        save_pretrained(Pretrained(whole.definition, params, whole.rest), tmp_path / "m", low_bits=bits)
    assert list(tmp_path.iterdir()) == []


def raw(path):
    """A folder's tensors as they are."""
    return _open_shard(path / "model.safetensors")


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("bits", "suffix", "change", "message"),
    [
        (0, "_scale_inv", lambda s: s * np.nan, "a scale is NaN, infinite or negative"),
        (1, "_scale", lambda s: s + np.inf, "a scale is NaN, infinite or negative"),
        (3, "_scale", lambda s: -s, "a scale is NaN, infinite or negative"),
        (3, "_scale", lambda s: s[:, :-1], "not a scale per row and group"),
        (3, "_packed", lambda p: p[:, :-1], "does not hold .* numbers of 4 or 8 bits"),
        (3, "_shape", None, "there is no .*_shape"),
        (2, "_scale", None, "there is no .*_scale"),
        (0, "", lambda v: np.full_like(v, np.nan), "a value is NaN"),
    ],
)
def test_broken_files_are_named(folder, tmp_path, bits, suffix, change, message):
    path = folder(DENSE, ALL[bits])
    tensors = raw(path)
    if change is None:
        del tensors[DOWN + suffix]
    else:
        tensors[DOWN + suffix] = np.ascontiguousarray(change(tensors[DOWN + suffix]))
    write_folder(tmp_path / "m", tensors.items(), {"config.json": (path / "config.json").read_text()})
    with pytest.raises(CheckpointFilesError, match=f"{DOWN}.*{message}"):
        load_pretrained(tmp_path / "m", packed=True)


def test_a_scale_of_zero_makes_zeros(folder, tmp_path):
    path = folder(DENSE, ALL[3])
    tensors = raw(path)
    tensors[DOWN + "_scale"] = np.zeros_like(tensors[DOWN + "_scale"])
    write_folder(tmp_path / "m", tensors.items(), {"config.json": (path / "config.json").read_text()})
    assert not WeightFiles(tmp_path / "m").read(DOWN).any()
    loaded = load_pretrained(tmp_path / "m", packed=True)
    assert not np.any(dequantize(loaded.params["dense_blocks.ffn.down_FD"])[0])
    assert np.isfinite(loaded(TOKENS).logits).all()


@pytest.mark.parametrize(
    ("bits", "change", "message"),
    [
        (3, {"format": "marlin-24"}, "quantization_config.format = 'marlin-24': only pack-quantized or int-quantized"),
        (3, {"weights": {"num_bits": 3}}, "weights.num_bits = 3: only 4 or 8"),
        (3, {"weights": {"symmetric": False}}, "weights.symmetric = False"),
        (2, {"input_activations": {"dynamic": False}}, "input_activations.dynamic = False"),
        (0, {"weight_block_size": [64, 64]}, "weight_block_size"),
        (0, {"activation_scheme": "static"}, "activation_scheme"),
    ],
)
def test_other_formats_are_refused_by_the_entry_that_says_so(bits, change, message):
    config = low_bits.config_entry(ALL[bits], group_size(ALL[bits], {64}))
    assert low_bits.inputs_format(config) == ("int8" if bits == 2 else None)
    config = json.loads(json.dumps(config))
    for part in ("weights", "input_activations"):
        if part in change:
            config["config_groups"]["group_0"][part] |= change[part]
    config |= {name: value for name, value in change.items() if name not in ("weights", "input_activations")}
    with pytest.raises(ConfigError, match=message):
        low_bits.inputs_format(config)


def test_packed_weights_are_not_quantised_again(folder, tmp_path):
    with pytest.raises(ValueError, match="load it without `packed`"):
        save_pretrained(load_pretrained(folder(DENSE, ALL[0]), packed=True), tmp_path / "m")
