"""Matrix products in the text of compiled programs: their types, FLOPs, and how often they run."""

from launch.compile import _products
from moe_jax.analysis.hlo import products

# Lines as XLA for TPUs (libtpu 0.0.42) writes them, shortened: a product in 8 bits in a loop of three; one of a batch
# of four; one that contracts two dimensions; a ragged one of eight matrices.
TEXT = """\
HloModule jit_update

%narrow (p: f8e4m3fn[64,96]) -> f32[128,96] {
  %a.1 = f8e4m3fn[64,128]{0,1:T(8,128)(4,1)} fusion(%p), kind=kLoop
  %b.1 = f8e4m3fn[96,64]{0,1} fusion(%p), kind=kLoop
  ROOT %convolution.1 = f32[128,96]{0,1:T(8,128)} convolution(%a.1, %b.1), dim_labels=fb_oi->bf, metadata={op_name="jit(update)/jvp()/attention/quantized_matmul/MK,KN->MN/dot_general"}
}

%body (s: (s32[])) -> (s32[]) {
  %n = f32[128,96]{1,0} fusion(%s), kind=kOutput, calls=%narrow
}

%condition (s: (s32[])) -> pred[] {
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%s, %limit), direction=LT
}

ENTRY %main (x: bf16[4,128,16]) -> f32[] {
  %x = bf16[4,128,16]{2,1,0} parameter(0)
  %y = bf16[4,24,16]{2,1,0} parameter(1)
  %w = bf16[8,16,32]{2,1,0} parameter(2)
  %v = bf16[128,4,16]{2,1,0} parameter(3)
  %r = bf16[512,16]{1,0} parameter(4)
  %sizes = s32[8]{0} parameter(5)
  %loop = (s32[]) while(%t), condition=%condition, body=%body
  %c.2 = f32[4,128,24]{2,1,0} convolution(%x, %y), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf, metadata={op_name="jit(update)/attention/attention_scores/dot_general"}
  %c.3 = f32[24,128,1]{2,1,0} convolution(%y, %v), window={size=4}, dim_labels=0bf_o0i->bo0, metadata={op_name="jit(update)/ffn/dot_general"}
  %g = f32[512,32]{1,0} custom-call(%sizes, /*index=1*/%r, %w), custom_call_target="tpu_custom_call", metadata={op_name="jit(update)/ffn/experts/ragged_dot_general/ragged-dot-none"}
  %m = s32[9]{0} custom-call(%sizes), custom_call_target="tpu_custom_call", metadata={op_name="ragged-dot-metadata"}
  %d = f32[128,32]{1,0} dot(%a.1, %r), lhs_contracting_dims={0}, rhs_contracting_dims={0}, metadata={op_name="jit(update)/router/dot"}
}
"""  # noqa: E501


def test_products_are_counted_with_their_types_and_loops():
    found = [(p.operands, p.flops, p.count, p.is_8_bit) for p in products(TEXT)]
    assert sorted(found) == sorted(
        [
            (("f8e4m3fn", "f8e4m3fn"), 2 * 128 * 96 * 64, 3, True),
            (("bf16", "bf16"), 2 * 4 * 128 * 24 * 16, 1, False),
            (("bf16", "bf16"), 2 * 24 * 128 * 4 * 16, 1, False),
            (("bf16", "bf16"), 2 * 512 * 16 * 32, 1, False),
            (("f8e4m3fn", "bf16"), 2 * 128 * 32 * 64, 1, False),
        ]
    )


def test_the_share_in_8_bits_and_the_places():
    figures = _products(TEXT)
    flops = {row["place"]: row["flops"] for row in figures["products"]}
    assert flops["attention"] == 3 * 2 * 128 * 96 * 64 and flops["ffn/experts"] == 2 * 512 * 16 * 32
    assert set(flops) == {"attention", "attention/attention_scores", "ffn", "ffn/experts", "router"}
    assert figures["flops_share_in_8_bits"] == flops["attention"] / sum(flops.values())
