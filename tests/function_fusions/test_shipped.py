"""The two further fusions, registered by the same call as anybody's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from prologue import Prologue, arguments

import fx_fusion
from fx_fusion.testing import assert_equal_after_fusion, assert_fuses
from fx_fusion.testing import run as run_fused


@pytest.fixture
def swiglu():
    with fx_fusion.fusions():
        yield fx_fusion.register_fusion(fx_fusion.SwiGLU())


def packed(x, w):
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.silu(gate) * up


def packed_up_first(x, w):
    up, gate = F.linear(x, w).split(w.shape[0] // 2, -1)
    return up * gate * torch.sigmoid(gate)


def separate(x, w):
    gate, up = F.linear(x, w[: w.shape[0] // 2]), F.linear(x, w[w.shape[0] // 2 :])
    return gate / (1 + torch.exp(-gate)) * up


def by_slices(x, w):
    y = x @ w.t()
    half = y.shape[-1] // 2
    return torch.mul(y[..., half:], F.silu(y[..., :half]))


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(packed, torch.bfloat16), (packed_up_first, torch.float32), (separate, torch.float32), (by_slices, torch.float16)],
)
def test_swiglu(swiglu, model, dtype):
    assert_equal_after_fusion(model, (torch.randn(2, 3, 8, dtype=dtype), torch.randn(32, 8, dtype=dtype)))


@pytest.mark.parametrize(
    "activation",
    [torch.relu, torch.sigmoid, lambda x: x * torch.sigmoid(1.702 * x), lambda x: x.clamp(max=7) * x.sigmoid()],
)
def test_other_gates_are_left_alone(swiglu, activation):
    def model(x, w):
        gate, up = F.linear(x, w).chunk(2, -1)
        return activation(gate) * up

    assert not run_fused(model, (torch.randn(3, 8), torch.randn(32, 8))).report.fused


def test_on_a_cpu_auto_rewrites_nothing(swiglu):
    report = run_fused(packed, (torch.randn(3, 8), torch.randn(32, 8)), kernel="auto").report
    assert [layer.code for layer in report.recognised] == ["contract.kernel"]
    assert not report.fused


class OpaqueStore(Prologue):
    """The engine stores somewhere else."""

    def store(self, cache, slots, value):
        pass

    def consume(self, q, k, v, k_cache, v_cache):
        return self.o_proj(q.flatten(1)), k, v


class GptJ(OpaqueStore):
    def rotate(self, x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


@pytest.mark.parametrize("model", [OpaqueStore, GptJ])
def test_qk_norm_rope_without_a_store(model):
    with fx_fusion.fusions():
        fx_fusion.register_fusion(fx_fusion.QkNormRope())
        report = assert_fuses(model(), arguments(), count=1)
    assert report.fused[0].reading["choices"] == {"is_neox": model is OpaqueStore}
    assert report.fused[0].reading["numbers"] == {"eps": 1e-6}


def test_the_built_in_fusion_goes_first():
    with fx_fusion.fusions("qk_norm_rope_cache"):
        fx_fusion.register_fusion(fx_fusion.QkNormRope())
        report = assert_fuses(Prologue(), arguments(), count=1)
    assert [layer.fusion for layer in report.fused] == ["qk_norm_rope_cache"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (3, 7, 100), (5, 4096), (2, 14336)])
def test_swiglu_kernel(dtype, shape):
    both = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, device="cuda")
    gate, up = both.chunk(2, -1)
    actual = torch.ops.fx_fusion.swiglu(gate, up)
    from fx_fusion.kernels.swiglu import operation as swiglu

    assert actual.is_contiguous() and swiglu._launch(gate, up) is not None
    torch.testing.assert_close(actual, swiglu.reference(gate, up))


@pytest.mark.gpu
def test_shipped_fusions_on_a_gpu():
    model = OpaqueStore(torch.bfloat16).cuda()
    args = tuple(arg.cuda() for arg in arguments(dtype=torch.bfloat16))
    with fx_fusion.fusions():
        fx_fusion.register_fusion(fx_fusion.QkNormRope())
        fx_fusion.register_fusion(fx_fusion.SwiGLU())
        report = assert_fuses(model, args, count=1, kernel="triton", inner="inductor")
        assert report.fused[0].kernel == "triton"
        inputs = (torch.randn(64, 256).cuda().bfloat16(), torch.randn(512, 256).cuda().bfloat16() / 16)
        assert assert_fuses(packed, inputs, count=1, kernel="auto", inner="inductor").fused[0].kernel == "triton"
