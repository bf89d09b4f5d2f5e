"""The call of aiter, through the registered operation, on a strict stand-in of aiter (aiter_stand_in.py)."""

from __future__ import annotations

import functools
import re

import aiter_stand_in as stand_in
import pytest
import torch
from aiter_stand_in import Aiter

import fx_fusion
from fx_fusion.kernels.capture_guard import FirstUseInCapture
from fx_fusion.kernels.qk_norm_rope_cache import self_check
from fx_fusion.kernels.qk_norm_rope_cache.aiter import arguments as aiter_arguments
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.kernels.target import Target

HEADS, KV_HEADS, ROWS, BLOCKS, BLOCK_SIZE = 5, 2, 50, 4, 16
INTERLEAVED, SECTIONED, ONE_AXIS = "interleaved", "sectioned", "one axis"
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    self_check.clear()
    aiter_arguments._host_scale.cache_clear()
    yield
    self_check.clear()


@pytest.fixture
def install(monkeypatch):
    def use(module):
        monkeypatch.setattr(aiter, "_module", lambda: module)
        return module

    return use


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(self_check.log, "warning", lambda message, *values: found.append(message % values))
    return found


# --- caches: two views, and the tensors that hold them ------------------------------------------------------------


def flat(dtype, head_dim):
    """[slots, H, D], each of its own."""
    holders = [torch.empty(1, 23, KV_HEADS, head_dim).to(dtype) for _ in "kv"]
    return holders, holders


def flat_side_by_side(dtype, head_dim):
    """[slots, H, 2 D]"""
    holder = torch.empty(1, 23, KV_HEADS, 2 * head_dim).to(dtype)
    return [holder], list(holder.split(head_dim, -1))


def flat_heads_first(dtype, head_dim):
    """[H, slots, D]"""
    holders = [torch.empty(1, KV_HEADS, 23, head_dim).to(dtype) for _ in "kv"]
    return holders, [holder.transpose(1, 2) for holder in holders]


def paged(dtype, head_dim):
    holders = [torch.empty(BLOCKS, BLOCK_SIZE, KV_HEADS, head_dim).to(dtype) for _ in "kv"]
    return holders, holders


def paged_heads_first(dtype, head_dim):
    holders = [torch.empty(BLOCKS, KV_HEADS, BLOCK_SIZE, head_dim).to(dtype) for _ in "kv"]
    return holders, [holder.transpose(1, 2) for holder in holders]


def paged_k_above_v(dtype, head_dim):
    """[blocks, 2, …]"""
    holder = torch.empty(BLOCKS, 2, BLOCK_SIZE, KV_HEADS, head_dim).to(dtype)
    return [holder], list(holder.unbind(1))


def paged_side_by_side(dtype, head_dim):
    """[blocks, H, slots, 2 D], as vLLM has it."""
    holder = torch.empty(BLOCKS, KV_HEADS, BLOCK_SIZE, 2 * head_dim).to(dtype)
    return [holder], list(holder.transpose(1, 2).split(head_dim, -1))


def shuffled(dtype, head_dim):
    x = 16 // dtype.itemsize
    k = torch.empty(BLOCKS, KV_HEADS, head_dim // x, BLOCK_SIZE, x).to(dtype)
    v = torch.empty(BLOCKS, KV_HEADS, BLOCK_SIZE // x, head_dim, x).to(dtype)
    return [k, v], [k, v]


FLAT = (flat, flat_side_by_side, flat_heads_first)
PAGED = (paged, paged_heads_first, paged_k_above_v, paged_side_by_side, shuffled)


class Case:
    """A call of the operation. Attributes are what a test changes."""

    def __init__(
        self, cache=flat, kind=INTERLEAVED, dtype=torch.bfloat16, cache_dtype=None, head_dim=64, rotary_dim=None,
        is_neox=True, gemma_norm=False, grid=(2, 3), **options,
    ):  # fmt: skip
        torch.manual_seed(7)
        batch, seq = grid
        rotary_dim = rotary_dim or head_dim
        half = rotary_dim // 2
        packed = torch.randn(batch, seq, (HEADS + 2 * KV_HEADS) * head_dim).to(dtype)
        sizes = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
        self.q, self.k, self.v = (part.unflatten(-1, (-1, head_dim)) for part in packed.split(sizes, -1))
        self.q_weight, self.k_weight = ((1 - gemma_norm + torch.randn(head_dim) / 4).to(dtype) for _ in "qk")
        angles = 6 * torch.rand(ROWS, half)
        self.table = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
        self.cos, self.sin = self.table.chunk(2, -1)
        num_axes = 1 if kind == ONE_AXIS else 3
        self.positions = torch.randint(ROWS, (seq, batch, num_axes)).permute(2, 1, 0)
        third = half // 4
        axes = {
            INTERLEAVED: [i % 3 if i % 3 and i < 3 * third else 0 for i in range(half)],
            SECTIONED: [0] * (half - 2 * third) + [1] * third + [2] * third,
            ONE_AXIS: [0] * half,
        }[kind]
        self.holders, (self.k_cache, self.v_cache) = cache(cache_dtype or dtype, head_dim)
        places = torch.randperm(BLOCKS * BLOCK_SIZE if cache in PAGED else 23)[: batch * seq].view(batch, seq)
        self.slots, self.blocks = (places % BLOCK_SIZE, places // BLOCK_SIZE) if cache in PAGED else (places, None)
        self.options = {
            "q_eps": 1e-6, "k_eps": 1e-6, "gemma_norm": gemma_norm, "rotary_dim": rotary_dim, "is_neox": is_neox,
            "axes": axes, **options,
        }  # fmt: skip

    def operands(self):
        return (
            self.q, self.k, self.v, self.q_weight, self.k_weight, self.cos, self.sin, self.positions, self.slots,
            self.blocks, self.k_cache, self.v_cache,
        )  # fmt: skip

    def run(self, implementation):
        """Both results, and what the tensors that hold the caches hold then. They start as NaN."""
        for holder in self.holders:
            holder.copy_(torch.full_like(holder, float("nan"), dtype=torch.float32))
        results = fx_fusion.qk_norm_rope_cache(*self.operands(), implementation=implementation, **self.options)
        return [*results, *(holder.clone() for holder in self.holders)]


def as_bytes(tensor):
    return tensor.view(torch.uint8)


def assert_equals_reference(case):
    """Within two units in the last place of the largest number. Caches hold NaN wherever nothing was written."""
    found, expected = case.run("aiter"), case.run("reference")
    for actual, right in zip(found, expected, strict=True):
        assert (actual.shape, actual.dtype) == (right.shape, right.dtype)
        largest = max([0.0, *right.float().nan_to_num().abs().flatten().tolist()])
        allowed = 2 * torch.finfo(right.dtype).eps * largest
        torch.testing.assert_close(actual.float(), right.float(), rtol=0, atol=allowed, equal_nan=True)
    return found


def assert_aiter_served(module, checks=1):
    """Called by each check and by the call itself, and no check failed."""
    assert [verdict.reason for verdict in self_check.verdicts()] == [None] * checks, self_check.verdicts()
    assert module.calls == checks + 1


def assert_fallback_served(case, match=""):
    """The check failed, and the result is right to the bit all the same."""
    found, expected = case.run("aiter"), case.run("reference")
    (verdict,) = self_check.verdicts()
    assert verdict.reason is not None
    assert match in verdict.reason
    for actual, right in zip(found, expected, strict=True):
        assert torch.equal(as_bytes(actual), as_bytes(right))
    return verdict


# --- equal to the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [INTERLEAVED, SECTIONED, ONE_AXIS])
@pytest.mark.parametrize("cache", [*FLAT, *PAGED], ids=lambda cache: cache.__name__)
def test_layouts(install, cache, kind):
    module = install(Aiter())
    assert_equals_reference(Case(cache, kind))
    assert_aiter_served(module)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"head_dim": 128},
        {"head_dim": 256},
        {"is_neox": False},
        {"gemma_norm": True},
        {"rotary_dim": 32},
        {"rotary_dim": 32, "is_neox": False},
        {"rotary_dim": 32, "kind": ONE_AXIS},
        {"q_eps": 1e-2, "k_eps": 1e-2},
        {"grid": (1, 7)},
        {"grid": (6, 1)},
        {"grid": (1, 1)},
        {"return_k": True},
        {"return_k": True, "cache": shuffled},
        {"skip_negative_slots": True},
        {"skip_negative_slots": True, "cache": paged},
    ],
    ids=lambda change: " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in change.items()),
)
def test_options(install, change):
    module = install(Aiter())
    assert_equals_reference(Case(**change))
    assert_aiter_served(module)


@pytest.mark.parametrize("cache", [flat, flat_side_by_side, paged_heads_first, shuffled], ids=lambda c: c.__name__)
@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_float8_caches(install, cache, float8):
    module = install(Aiter())
    assert_equals_reference(Case(cache, cache_dtype=float8, k_scale=0.5, v_scale=0.03))
    assert_equals_reference(Case(cache, cache_dtype=float8))
    assert len(self_check.verdicts()) == 2
    assert module.calls == 4


def test_what_no_float8_holds_must_become_the_same(install):
    """Of the two formats PyTorch's own conversion gives NaN for this one in every version."""
    float8 = torch.float8_e4m3fnuz
    install(Aiter(saturates=True))
    assert_equals_reference(Case(cache_dtype=float8, v_scale=1e-4, saturate=True))
    assert self_check.verdicts()[0].reason is None
    self_check.clear()
    assert_fallback_served(Case(cache_dtype=float8, v_scale=1e-4), match="v_cache")


@pytest.mark.parametrize("cache", [flat, flat_side_by_side, paged, shuffled], ids=lambda cache: cache.__name__)
def test_indices_count_from_the_end(install, cache):
    module = install(Aiter())
    case = Case(cache)
    case.positions[0, 1, 2] -= ROWS
    case.slots[0, 1] -= 23 if cache in FLAT else BLOCK_SIZE
    if case.blocks is not None:
        case.blocks[1, 0] -= BLOCKS
    assert_equals_reference(case)
    assert_aiter_served(module)


@pytest.mark.parametrize("cache", [flat, paged, shuffled], ids=lambda cache: cache.__name__)
def test_negative_slots_are_skipped(install, cache):
    module = install(Aiter())
    case = Case(cache, skip_negative_slots=True)
    case.slots[0, 1] = case.slots[1, 2] = -1
    found = assert_equals_reference(case)
    written = sum(int((~holder.float().isnan()).sum()) for holder in found[2:])
    assert written == 2 * KV_HEADS * 4 * 64
    assert_aiter_served(module)


def test_indices_that_sequences_share(install):
    module = install(Aiter())
    case = Case(paged)
    case.positions, case.slots = case.positions[:, :1], torch.tensor([[1, 5, 2]])
    case.blocks = torch.tensor([[0, 1, 3], [1, 2, 0]])
    assert_equals_reference(case)
    assert_aiter_served(module)


def test_slots_of_any_stride(install):
    module = install(Aiter())
    case = Case(skip_negative_slots=True)
    case.slots = torch.stack([case.slots, torch.full_like(case.slots, 99)], -1)[..., 0]
    assert not case.slots.is_contiguous()
    assert_equals_reference(case)
    assert_aiter_served(module)


def test_inside_larger_tensors(install):
    """Storage offsets, of the projection, the table and the caches."""
    module = install(Aiter())
    case = Case()
    for names, count in ((("q", "k", "v"), 2), (("cos", "sin"), 3)):
        views = [getattr(case, name) for name in names]
        first = views[0]
        holder = torch.randn(count * 64 + first.untyped_storage().nbytes() // 2).to(first.dtype)
        inner = holder[count * 64 :]
        inner.copy_(torch.empty(0, dtype=first.dtype).set_(first.untyped_storage()))
        for name, view in zip(names, views, strict=True):
            setattr(case, name, inner.as_strided(view.shape, view.stride(), count * 64 + view.storage_offset()))
    case.holders = [torch.empty(3, 23, KV_HEADS, 64).bfloat16() for _ in "kv"]
    case.k_cache, case.v_cache = (holder[1:2] for holder in case.holders)
    assert_equals_reference(case)
    assert_aiter_served(module)


def test_no_tokens(install):
    module = install(Aiter())
    case = Case(grid=(1, 0), return_k=True)
    q_out, k_out = fx_fusion.qk_norm_rope_cache(*case.operands(), implementation="aiter", **case.options)
    assert q_out.shape == (1, 0, HEADS, 64)
    assert k_out.shape == (1, 0, KV_HEADS, 64)
    assert module.calls == 1


def test_one_kv_head(install):
    module = install(Aiter())
    case = Case()
    packed = torch.randn(2, 3, 6, 64).bfloat16()
    case.q, case.k, case.v = packed.split([4, 1, 1], 2)
    case.holders = [torch.empty(1, 23, 1, 64).bfloat16() for _ in "kv"]
    case.k_cache, case.v_cache = case.holders
    assert_equals_reference(case)
    assert_aiter_served(module)


@pytest.mark.slow
def test_inductor_passes_views_of_the_projection(install):
    """A copy of q, k or v would be refused."""
    module = install(Aiter())
    case = Case(return_k=True)
    projection = torch.randn((HEADS + 2 * KV_HEADS) * 64, 32).bfloat16()

    def prologue(x, positions, slots, k_cache, v_cache, implementation):
        heads = torch.nn.functional.linear(x, projection).unflatten(-1, (-1, 64))
        return fx_fusion.qk_norm_rope_cache(
            *heads.split([HEADS, KV_HEADS, KV_HEADS], 2), case.q_weight, case.k_weight, *case.table.chunk(2, -1),
            positions, slots, None, k_cache, v_cache, implementation=implementation, **case.options,
        )  # fmt: skip

    x = torch.randn(2, 3, 32).bfloat16()
    caches, expected_caches = ([torch.zeros_like(holder) for holder in case.holders] for _ in "ab")
    results = torch.compile(prologue)(x, case.positions, case.slots, *caches, "aiter")
    expected = prologue(x, case.positions, case.slots, *expected_caches, "reference")
    for actual, right in zip((*results, *caches), (*expected, *expected_caches), strict=True):
        torch.testing.assert_close(actual, right, rtol=0, atol=2 * 2**-7 * float(right.abs().max()))
    assert_aiter_served(module)


# --- the check ----------------------------------------------------------------------------------------------------


def test_is_made_once_for_each_specialization(install):
    module = install(Aiter())
    for _ in range(3):
        Case().run("aiter")
        Case(grid=(1, 5)).run("aiter")
        Case(kind=SECTIONED).run("aiter")
    assert len(self_check.verdicts()) == 2
    assert module.calls == 2 + 9


def test_leaves_the_random_state_alone(install):
    install(Aiter())
    case = Case()
    before = torch.get_rng_state()
    case.run("aiter")
    assert torch.equal(torch.get_rng_state(), before)


BROKEN = {
    stand_in.OtherEps: {},
    stand_in.EpsOutsideTheRoot: {},
    stand_in.GemmaIgnored: {"gemma_norm": True},
    stand_in.AxesSwapped: {},
    stand_in.HeightAndWidthSwapped: {"kind": SECTIONED},
    stand_in.SectionsIgnored: {},
    stand_in.AlwaysSectioned: {},
    stand_in.PositionsReadAsContiguous: {},
    stand_in.OtherPairs: {},
    stand_in.OtherDirection: {},
    stand_in.RotaryDimIgnored: {"rotary_dim": 32},
    stand_in.RestNotCopied: {"rotary_dim": 32},
    stand_in.OneHeadWrong: {},
    stand_in.OneLaneWrong: {},
    stand_in.VNotWritten: {},
    stand_in.KStoredBeforeRotation: {},
    stand_in.KAndVSwapped: {},
    stand_in.ScaleInverted: {"cache_dtype": FLOAT8, "k_scale": 0.5, "v_scale": 0.5},
    stand_in.ScaleIgnored: {"cache_dtype": FLOAT8, "v_scale": 0.5},
    stand_in.RoundsToTheNextSmaller: {"cache_dtype": FLOAT8},
    stand_in.WrongHeadStride: {},
    stand_in.ReadsA3DCache: {},
    stand_in.OffByOneSlot: {},
    stand_in.OneSlotTwice: {},
    stand_in.WritesItsInput: {},
    stand_in.NegativeSlotsWritten: {"skip_negative_slots": True},
}


@pytest.mark.parametrize("variant", BROKEN, ids=lambda variant: variant.__name__)
@pytest.mark.parametrize("cache", [flat, paged], ids=lambda cache: cache.__name__)
def test_finds(install, warnings, variant, cache):
    module = install(variant())
    case = Case(cache, **BROKEN[variant])
    verdict = assert_fallback_served(case)
    assert "differs by" in verdict.reason or "written outside" in verdict.reason
    case.run("aiter")
    assert module.calls == 1
    (warning,) = warnings
    assert warning.startswith("fx_fusion: aiter on cpu is not used: ")


def test_every_variant_is_tested():
    variants = {value for value in vars(stand_in).values() if isinstance(value, type) and issubclass(value, Aiter)}
    assert variants - {Aiter} == set(BROKEN)


@pytest.mark.parametrize("cache", [flat, paged, shuffled], ids=lambda cache: cache.__name__)
def test_before_it_read_strides_contiguous_caches_are_served(install, cache):
    module = install(Aiter(reads_strides=False))
    assert_equals_reference(Case(cache))
    assert_aiter_served(module)


@pytest.mark.parametrize(
    "cache",
    [flat_side_by_side, flat_heads_first, paged_heads_first, paged_k_above_v, paged_side_by_side],
    ids=lambda cache: cache.__name__,
)
def test_before_it_read_strides_other_caches_are_not(install, cache):
    install(Aiter(reads_strides=False))
    assert_fallback_served(Case(cache), match="cache")


class RenamedFunction(Aiter):
    fused_qk_norm_mrope_3d_cache_pts_quant_shuffle = None


class MoreArguments(Aiter):
    def fused_qk_norm_mrope_3d_cache_pts_quant_shuffle(self, *arguments):
        raise TypeError("incompatible function arguments")


class DoesNotBuild(Aiter):
    def fused_qk_norm_mrope_3d_cache_pts_quant_shuffle(self, *arguments):
        raise RuntimeError("hipcc failed")


class Unrelated:
    """The asyncio helper."""


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (MoreArguments, "TypeError: incompatible function arguments"),
        (DoesNotBuild, "RuntimeError: hipcc failed"),
        (RenamedFunction, "has no function fused_qk_norm_mrope_3d_cache_pts_quant_shuffle"),
        (Unrelated, "has no function fused_qk_norm_mrope_3d_cache_pts_quant_shuffle"),
    ],
)
def test_what_cannot_be_called_is_not_used(install, monkeypatch, warnings, module, reason):
    monkeypatch.setattr(aiter, "installed", lambda: None)
    install(module())
    verdict = assert_fallback_served(Case(), match=reason)
    assert verdict.differences == ()
    assert len(warnings) == 1


def test_a_package_that_is_not_there_is_not_used(monkeypatch, warnings):
    def missing():
        raise ModuleNotFoundError("No module named 'aiter'")

    monkeypatch.setattr(aiter, "_module", missing)
    assert_fallback_served(Case(), match="No module named 'aiter'")


def test_running_out_of_memory_says_nothing_about_the_kernel(install, monkeypatch):
    module = install(Aiter())
    with monkeypatch.context() as patch:

        def full(*_):
            raise torch.OutOfMemoryError("full")

        patch.setattr(Aiter, "run", full)
        with pytest.raises(torch.OutOfMemoryError):
            Case().run("aiter")
    assert self_check.verdicts() == ()
    assert_equals_reference(Case())
    assert_aiter_served(module)


def test_triton_serves_where_it_runs(install, monkeypatch):
    install(stand_in.OffByOneSlot())
    served = []

    def kernel(call):
        served.append(call)
        return fx_fusion.kernels.qk_norm_rope_cache.reference.qk_norm_rope_cache(call)

    monkeypatch.setattr(aiter.triton.Triton, "unavailable", lambda self, target: None)
    monkeypatch.setattr(aiter.triton, "launch", kernel)
    assert_fallback_served(Case())
    assert len(served) == 1


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("table_rows", lambda positions, rows: positions.clamp(min=0)),
        ("slot_mapping", lambda slots, *_: slots.clamp(min=0)),
    ],
)
def test_finds_indices_that_do_not_count_from_the_end(install, monkeypatch, function, wrong):
    install(Aiter())
    monkeypatch.setattr(aiter_arguments, function, wrong)
    assert_fallback_served(Case())


def test_checks_any_kernel():
    """Operands that aiter does not take: rows of angles, separate scales on the device, a cache for each sequence."""
    from fx_fusion.kernels.qk_norm_rope_cache import reference
    from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
    from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options
    from fx_fusion.kernels.qk_norm_rope_cache.specialization import Specialization

    q, kv = torch.randn(2, 3, 5, 48), torch.randn(2, 3, 2, 48)
    cos = torch.randn(2, 3, 24)
    cache = torch.zeros(2, 9, 2, 48, dtype=torch.float8_e5m2)
    layout = CacheLayout.of(cache.transpose(1, 2).contiguous().transpose(1, 2))
    scale = torch.ones(1)
    options = Options(
        k_layout=layout, v_layout=layout, k_scale_value=None, v_scale_value=2.0, q_eps=None, k_eps=1e-6,
        gemma_norm=False, rotary_dim=24, is_neox=False, axes=(0,) * 12, saturate=True, skip_negative_slots=False,
        return_k=True,
    )  # fmt: skip
    slots = torch.arange(3)[None]
    call = Call(q, kv, kv, None, None, cos, cos, None, slots, None, scale, None, cache, cache, options)
    specialization = Specialization.of(call)
    # A default device is no business of the check's.
    with torch.device("meta"):
        assert self_check.verdict("itself", reference.qk_norm_rope_cache, specialization).reason is None

    @functools.wraps(reference.qk_norm_rope_cache)
    def wrong(call):
        q_out, k_out = reference.qk_norm_rope_cache(call)
        k_out[1, 1, 1, 1] += 0.01
        return q_out, k_out

    verdict = self_check.verdict("wrong", wrong, specialization)
    assert "k_out differs by 0.01 at [1, 1, 1, 1]" in verdict.reason


# --- capture ------------------------------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch):
    def begin(yes=True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: yes)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: yes)

    return begin


def test_a_first_use_in_a_capture_raises_and_leaves_nothing_behind(install, capturing):
    module = install(Aiter())
    capturing()
    with pytest.raises(FirstUseInCapture, match="run the call once, with tensors like these, before the"):
        Case().run("aiter")
    assert self_check.verdicts() == ()
    assert module.calls == 0
    capturing(False)
    assert_equals_reference(Case())
    assert_aiter_served(module)


def test_later_uses_are_captured(install, capturing):
    module = install(Aiter())
    Case().run("aiter")
    capturing()
    assert_equals_reference(Case())
    assert module.calls == 3


def test_a_new_scale_in_a_capture_raises(install, capturing):
    install(Aiter())
    Case(cache_dtype=FLOAT8, k_scale=0.5, v_scale=0.5).run("aiter")
    capturing()
    assert_equals_reference(Case(cache_dtype=FLOAT8, k_scale=0.5, v_scale=0.5))
    with pytest.raises(FirstUseInCapture, match=r"the scale 0\.25 is used for the first time"):
        Case(cache_dtype=FLOAT8, k_scale=0.25, v_scale=0.5).run("aiter")


def test_scales_are_made_once_on_the_host():
    with torch.device("meta"):
        scale = aiter_arguments.host_scale(0.125)
    assert (scale.device.type, scale.dtype, scale.tolist()) == ("cpu", torch.float32, [0.125])
    assert aiter_arguments.host_scale(0.125) is scale
    assert aiter_arguments.host_scale(None).tolist() == [1.0]


# --- what aiter would read as garbage -----------------------------------------------------------------------------


def no_common_storage(case):
    case.v = case.v.clone()


def v_of_another_projection(case):
    case.v = torch.randn(2, 3, HEADS + 2 * KV_HEADS, 64).bfloat16()[:, :, -KV_HEADS:]


def sine_of_another_table(case):
    case.sin = torch.randn(ROWS, 64).bfloat16()[:, 32:]


def other_order(case):
    case.k, case.v = case.v, case.k


def padded_projection(case):
    padded = torch.randn(2, 3, HEADS + 2 * KV_HEADS + 1, 64).bfloat16()
    case.q, case.k, case.v, _ = padded.split([HEADS, KV_HEADS, KV_HEADS, 1], 2)


def other_v_dtype(case):
    case.v = case.v.half()


def two_tables(case):
    case.cos, case.sin = case.cos.clone(), case.sin.clone()


def sine_first(case):
    case.cos, case.sin = case.sin, case.cos


def wide_table(case):
    wide = torch.randn(ROWS, 100).bfloat16()
    case.cos, case.sin = wide[:, :32], wide[:, 32:64]


def an_angle_for_every_lane(case):
    case.cos, case.sin = torch.randn(2, ROWS, 64).bfloat16()


def an_angle_for_every_lane_side_by_side(case):
    """Halves of one table, of twice the width."""
    case.cos, case.sin = torch.randn(ROWS, 128).bfloat16().chunk(2, -1)


def rows_of_angles(case):
    case.positions, (case.cos, case.sin) = None, torch.randn(2, 2, 3, 32).bfloat16()


def strided_weight(case):
    case.k_weight = torch.ones(128).bfloat16()[::2]


def change(**values):
    def apply(case):
        for name, value in values.items():
            if name in case.options or name in ("k_scale", "v_scale", "return_k", "skip_negative_slots"):
                case.options[name] = value
            else:
                setattr(case, name, value(getattr(case, name)))

    return apply


REFUSED = [
    (no_common_storage, "argument qkv (v): expected strides"),
    (
        v_of_another_projection,
        "argument qkv (v): expected memory shared with what precedes it, found memory of its own",
    ),
    (sine_of_another_table, "argument cos_sin (sin): expected memory shared with what precedes it"),
    (other_order, "argument qkv (k): expected storage offset 320, next to what precedes it, found 448"),
    (padded_projection, "argument qkv (q): expected strides"),
    (other_v_dtype, "argument qkv (v): expected torch.bfloat16, found torch.float16"),
    (change(q_weight=lambda w: w.float()), "argument qw: expected the dtype of qkv, found torch.float32"),
    (change(k_weight=lambda w: w.float()), "argument kw: expected the dtype of qkv, found torch.float32"),
    (change(k_weight=lambda w: None), "argument kw: expected the dtype of qkv, found None"),
    (strided_weight, "argument kw: expected [64], contiguous, found [64] with strides [2]"),
    (change(cos=lambda c: c.float(), sin=lambda s: s.float()), "argument cos_sin: expected the dtype of qkv, found"),
    (two_tables, "argument cos_sin (cos): expected strides (64, 1)"),
    (sine_first, "argument cos_sin (sin): expected storage offset 64, next to what precedes it, found 0"),
    (wide_table, "argument cos_sin (cos): expected strides (64, 1), as in one contiguous tensor, found (100, 1)"),
    (an_angle_for_every_lane, "argument cos_sin: expected one table"),
    (an_angle_for_every_lane_side_by_side, "argument cos_sin: expected one table"),
    (rows_of_angles, "argument cos_sin: expected one table"),
    (change(positions=lambda p: p.int()), "argument positions: expected int64, found torch.int32"),
    (change(positions=lambda p: p[:2], axes=[0] * 32), "argument positions: expected 1 or 3 axes, found 2"),
    (change(axes=[2, 1] * 16), "argument mrope_section_: expected sections"),
    (change(slots=lambda s: s.int()), "argument slot_mapping: expected int64, found torch.int32"),
    (change(k_eps=1e-5), "argument eps: expected one value for q and k, found (1e-06, 1e-05)"),
    (change(q_eps=None, k_eps=None), "argument eps: expected a norm on q and on k"),
    (change(k_scale=torch.ones(1)), "argument k_scale, v_scale: expected a number, found a tensor"),
    (change(v_scale=torch.ones(1)), "argument k_scale, v_scale: expected a number, found a tensor"),
    (change(v_scale=0.5), "argument k_scale, v_scale: expected none, as aiter divides only what it converts"),
    (change(return_k=True, skip_negative_slots=True), "argument k_out: expected no rotated k"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED, ids=[message[9:60] for _, message in REFUSED])
def test_refuses(install, spoil, message):
    module = install(Aiter())
    case = Case()
    spoil(case)
    with pytest.raises(ValueError, match=re.escape(message) + ".*; pass it like that, or call another kernel"):
        fx_fusion.qk_norm_rope_cache(*case.operands(), implementation="aiter", **case.options)
    assert module.calls == 0


CACHES_REFUSED = [
    (paged, (BLOCKS, 12, KV_HEADS, 64), "argument block_size: expected a power of two, found 12"),
    (flat, (3, 23, KV_HEADS, 64), "argument slot_mapping: expected one cache, found a cache per sequence"),
    (shuffled, (BLOCKS, KV_HEADS, 16, BLOCK_SIZE, 4), "argument k_cache: expected lanes in groups of 8"),
]


@pytest.mark.parametrize(("cache", "size", "message"), CACHES_REFUSED, ids=[c.__name__ for c, *_ in CACHES_REFUSED])
def test_refuses_caches(install, cache, size, message):
    install(Aiter())
    case = Case(cache)
    case.k_cache = torch.zeros(size).bfloat16()
    if cache is not shuffled:
        case.v_cache = torch.zeros(size).bfloat16()
    with pytest.raises(ValueError, match=re.escape(message)):
        case.run("aiter")


def test_refuses_lanes_that_are_not_next_to_each_other(install):
    install(Aiter())
    case = Case()
    case.v_cache = torch.zeros(1, 23, 64, KV_HEADS).bfloat16().transpose(2, 3)
    with pytest.raises(ValueError, match="argument v_cache: expected a unit lane stride, found 2"):
        case.run("aiter")


def test_refuses_a_shuffled_cache_with_gaps(install):
    install(Aiter())
    case = Case(shuffled)
    case.k_cache = torch.zeros(BLOCKS, 2, *case.k_cache.shape[1:]).bfloat16()[:, 0]
    with pytest.raises(ValueError, match="argument k_cache: expected the shuffle layout, contiguous, found strides"):
        case.run("aiter")


def test_refuses_slots_alone_in_the_shuffle_layout(install):
    install(Aiter())
    case = Case(shuffled)
    case.k_cache, case.v_cache, case.blocks = case.k_cache[:1], case.v_cache[:1], None
    with pytest.raises(ValueError, match="argument slot_mapping: expected a block and an offset"):
        case.run("aiter")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda v: v.half(), "the dtype of k_cache, found torch.float16"),
        (lambda v: v[:3], "the blocks of k_cache"),
        (lambda v: shuffled(torch.bfloat16, 64)[1][1], "the shuffle layout of k_cache, False, found True"),
    ],
)
def test_refuses_a_v_cache_unlike_the_k_cache(install, other, message):
    install(Aiter())
    case = Case(paged)
    case.v_cache = other(case.v_cache)
    with pytest.raises(ValueError, match=f"argument v_cache: expected {message}"):
        case.run("aiter")


# --- the stand-in itself ------------------------------------------------------------------------------------------


def test_the_stand_in_takes_positions_only():
    with pytest.raises(TypeError):
        Aiter().fused_qk_norm_mrope_3d_cache_pts_quant_shuffle(qkv=None)


def test_the_stand_in_dereferences_scales_on_the_host():
    with pytest.raises(stand_in.Abort, match="dereferenced on the host"):
        Aiter().host_float(torch.ones(1, device="meta"))
    assert Aiter().host_float(torch.ones(1, dtype=torch.float64)) == 0.0


def test_the_stand_in_reads_other_dtypes_as_garbage():
    positions = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)
    assert not torch.equal(Aiter().positions(positions, 2), positions.long())
    weights = torch.ones(4)
    assert not torch.equal(stand_in.read(weights, torch.bfloat16, torch.arange(4)).float(), weights)


# --- dispatch -----------------------------------------------------------------------------------------------------


def test_serves_where_it_is_installed(monkeypatch):
    """By its name; tests/test_dispatch.py has what `auto` prefers."""
    import test_aiter_contract

    served = test_aiter_contract.served()
    monkeypatch.setattr(aiter, "installed", lambda: None)
    assert aiter.Aiter().unavailable(Target("gfx942")) is None
    assert OPERATION.choose("aiter", served, Target("gfx942")) == "aiter"
    assert OPERATION.choose("aiter", served, Target("hip")) == "aiter"
