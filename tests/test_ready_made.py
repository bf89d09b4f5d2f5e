"""Each meaning that comes with the package, beside a stand-in with the library's schema, written apart from it."""

from __future__ import annotations

import opaque_ops
import pytest
import torch

from fx_fusion.graph.sizes import Sizes
from fx_fusion.semantics.compare import Comparisons
from fx_fusion.semantics.libraries import READY_MADE, sglang, vllm
from fx_fusion.semantics.meaning import Meaning, signature_mismatch
from fx_fusion.semantics.traced import complete

TOKENS, HEADS, KV_HEADS, HEAD_DIM, BLOCKS, BLOCK_SIZE, GROUP = 5, 4, 2, 16, 8, 4, 4


def floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape)


def integers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64)


HIDDEN, WEIGHT, TABLE = floats(TOKENS, 32), floats(32), floats(40, HEAD_DIM)
QUERY, KEY = floats(TOKENS, HEADS * HEAD_DIM), floats(TOKENS, KV_HEADS * HEAD_DIM)
Q_HEADS, K_HEADS, V_HEADS = (floats(TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
PAGED, SCALE = (floats(BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM) for _ in "kv"), floats()
GROUPED = floats(BLOCKS, KV_HEADS, HEAD_DIM // GROUP, BLOCK_SIZE, GROUP), floats(BLOCKS, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
MROPE = (QUERY, KEY, TABLE, HEAD_DIM, HEAD_DIM, 4, 2, 2)
ROPE = (Q_HEADS, K_HEADS, Q_HEADS, K_HEADS, TABLE, integers(TOKENS))

#: Arguments for each operation, in every way that is to be compared.
CALLS = {
    "vllm_ir::rms_norm": [(HIDDEN, WEIGHT, 1e-6), (HIDDEN, None, 1e-6), (HIDDEN.bfloat16(), WEIGHT, 1e-6)],
    "_C::rms_norm": [(HIDDEN, HIDDEN, WEIGHT, 1e-6)],
    "_C::fused_add_rms_norm": [(HIDDEN, HIDDEN, WEIGHT, 1e-6)],
    "_C::rotary_embedding": [
        (integers(TOKENS), QUERY, KEY, HEAD_DIM, TABLE, True),
        (integers(TOKENS), QUERY, None, HEAD_DIM, TABLE, False),
        (integers(TOKENS), QUERY, KEY, HEAD_DIM, TABLE[:, :8], True),
    ],
    "vllm::mrope": [
        (integers(3, TOKENS), *MROPE, True, True),
        (integers(3, TOKENS), *MROPE, False, False),
        (integers(TOKENS), *MROPE, True, True),
        (integers(TOKENS), *MROPE, False, False),
    ],
    "_C::fused_qk_norm_rope": [
        (floats(TOKENS, 8 * HEAD_DIM), 4, 2, 2, HEAD_DIM, 1e-6, *floats(2, HEAD_DIM), TABLE, is_neox, integers(TOKENS))
        for is_neox in (True, False)
    ],
    "_C_cache_ops::reshape_and_cache_flash": [(K_HEADS, V_HEADS, *PAGED, integers(TOKENS), "auto", SCALE, SCALE)],
    "_C_cache_ops::reshape_and_cache": [
        (K_HEADS, V_HEADS, *GROUPED, integers(TOKENS), "auto", SCALE, SCALE),
        (K_HEADS, V_HEADS, *GROUPED, integers(TOKENS - 2), "auto", SCALE, SCALE),
    ],
    "sgl_kernel::rmsnorm": [(HIDDEN, HIDDEN, WEIGHT, 1e-6, False)],
    "sgl_kernel::gemma_rmsnorm": [(HIDDEN, HIDDEN, WEIGHT, 1e-6, False)],
    "sgl_kernel::fused_add_rmsnorm": [(HIDDEN, HIDDEN, WEIGHT, 1e-6, False)],
    "sgl_kernel::gemma_fused_add_rmsnorm": [(HIDDEN, HIDDEN, WEIGHT, 1e-6, False)],
    "sgl_kernel::apply_rope_pos_ids_cos_sin_cache": [
        (*ROPE, False, False, None, None, None, None),
        (*ROPE, True, False, V_HEADS, floats(8, KV_HEADS, HEAD_DIM), floats(8, KV_HEADS, HEAD_DIM), integers(TOKENS)),
    ],
    "sglang::store_cache": [(KEY, KEY, floats(8, KEY.shape[1]), floats(8, KEY.shape[1]), integers(TOKENS))],
}  # fmt: skip


def test_every_meaning_is_compared():
    assert {f"{name}.default" for name in CALLS} == set(READY_MADE)


def find(name: str) -> torch._ops.OpOverload:
    namespace, base = name.split("::")
    return getattr(getattr(torch.ops, namespace), base).default


def compare(meaning, op, places):
    names = [argument.name for argument in op._schema.arguments]
    written = [argument.name for argument in op._schema.arguments if argument.is_write]
    sample = complete(op, dict(zip(names, places, strict=False)))
    written = [name for name in written if sample[name] is not None]
    return Comparisons().of(meaning, op, sample, written, Sizes())


@pytest.mark.parametrize("name", CALLS)
def test_does_what_the_operation_does(name, libraries):
    for places in CALLS[name]:
        comparison = compare(READY_MADE[f"{name}.default"], find(name), places)
        assert comparison.why_not is None and not comparison.differs, comparison


@pytest.mark.parametrize(
    ("name", "argument", "change", "told"),
    [
        ("_C::fused_add_rms_norm", "residual", torch.clone, "residual differs"),
        ("sgl_kernel::fused_add_rmsnorm", "input", torch.clone, "input differs"),
        ("sgl_kernel::gemma_fused_add_rmsnorm", "weight", lambda weight: weight - 1, "input differs"),
        ("vllm::mrope", "positions", lambda positions: positions.flip(-1), "q differs"),
        ("_C::fused_qk_norm_rope", "eps", lambda eps: 2 * eps, "qkv differs"),
        ("_C_cache_ops::reshape_and_cache", "slot_mapping", lambda slots: slots.abs(), "key_cache differs"),
    ],
)
def test_the_comparison_tells_a_meaning_that_differs(name, argument, change, told, libraries):
    usual, op = READY_MADE[f"{name}.default"], find(name)
    names = [each.name for each in op._schema.arguments]

    def fn(*places):
        assert usual.fn is not None
        usual.fn(*(change(given) if name == argument else given for name, given in zip(names, places, strict=True)))

    places = CALLS[name][-1]
    comparison = compare(Meaning(usual.name, fn, usual.example), op, places)
    assert comparison.differs
    assert told in str(comparison.why_not)


def test_a_sum_is_not_rounded_before_the_norm():
    """256 + 1 is 256 in bfloat16, and what the other lane is divided by depends on it."""
    row, weight = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)
    other = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)

    def second_lane(first: float) -> torch.Tensor:
        return torch.tensor(((first**2 + 1) / 2) ** -0.5, dtype=torch.bfloat16)

    assert second_lane(256) != second_lane(257)
    for fn in (vllm.c_fused_add_rms_norm, sglang.fused_add_rmsnorm):
        given, residual = other.clone(), row.clone()
        fn(given, residual, weight, 0.0)
        assert residual.tolist() == [[256.0, 1.0]]
        assert given[0, 1] == second_lane(257)


def test_sglang_skips_the_slot_of_padding():
    """Later versions store nothing at slot 0, unless told otherwise."""
    held = opaque_ops.register("sglang_later", opaque_ops.SGLANG_LATER["sglang"])
    usual, op = READY_MADE["sglang::store_cache.default"], torch.ops.sglang_later.store_cache.default
    k, v, *caches, indices = CALLS["sglang::store_cache"][0]
    assert compare(usual, op, (k, v, *caches, indices)).difference == 0

    def always(k, v, k_cache, v_cache, indices, **_):
        sglang.store_cache(k, v, k_cache, v_cache, indices)

    comparison = compare(Meaning(usual.name, always, usual.example), op, (k, v, *caches, indices))
    assert "k_cache differs" in str(comparison.why_not)
    held._destroy()


#: Schemas of other versions.
OTHER_VERSIONS = {
    "_C::rms_norm": "(Tensor! out, Tensor input, Tensor weight, float epsilon) -> ()",
    "_C::rotary_embedding": (
        "(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox) -> ()"
    ),
    "_C::fused_qk_norm_rope": (
        "(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps, Tensor q_weight, "
        "Tensor k_weight, Tensor cos_sin_cache, bool is_neox, Tensor position_ids) -> ()"
    ),
    "vllm::mrope": (
        "(Tensor positions, Tensor! query, Tensor! key, Tensor cos_sin_cache, int head_size, int rotary_dim, "
        "int mrope_section_t, int mrope_section_h, int mrope_section_w, bool mrope_interleaved) -> ()"
    ),
    "_C_cache_ops::reshape_and_cache": (
        "(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "float k_scale, float v_scale) -> ()"
    ),
    "_C_cache_ops::reshape_and_cache_flash": (
        "(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "float k_scale, float v_scale) -> ()"
    ),
    "sgl_kernel::apply_rope_pos_ids_cos_sin_cache": (
        "(Tensor q, Tensor k, Tensor! q_rope, Tensor! k_rope, Tensor cos_sin_cache, Tensor pos_ids, bool interleave, "
        "bool enable_pdl, int cuda_stream, Tensor? v, Tensor!? k_buffer, Tensor!? v_buffer, Tensor? kv_cache_loc) -> ()"
    ),
    "sglang::store_cache": opaque_ops.SCHEMAS["store_cache_reserving"],
}


@pytest.mark.parametrize("name", OTHER_VERSIONS)
def test_other_versions_are_served(name):
    base = name.split("::")[1]
    held = torch.library.Library("other_version", "FRAGMENT")
    held.define(base + OTHER_VERSIONS[name])
    fn = READY_MADE[f"{name}.default"].fn
    assert fn is not None
    assert signature_mismatch(find(f"other_version::{base}"), fn) is None
    held._destroy()
