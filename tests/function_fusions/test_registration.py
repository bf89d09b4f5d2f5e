"""What ``register_fusion`` says at once, before anything is compiled."""

from __future__ import annotations

import pytest
import torch

import fx_fusion
from function_fusions import patterns
from fx_fusion.testing import assert_fuses


def missing(x, weight, eps):
    return torch.ops.nobody.rms_norm(x, weight, eps)


def missing_elsewhere(x, weight, eps):
    """On this machine it would not be called."""
    if x.is_cuda:
        return torch.ops.nobody.rms_norm(x, weight, eps)
    return patterns.rms_norm(x, weight, eps)


def missing_inside(x, weight, eps):
    return helper(x, weight, eps)


def helper(x, weight, eps):
    return torch.ops.nobody.rms_norm(x, weight, eps)


def missing_name(x, weight, eps):
    return my_kernel(x, weight, eps)  # noqa: F821


@pytest.mark.parametrize("replacement", [missing, missing_elsewhere, missing_inside, missing_name])
def test_an_operation_that_does_not_exist(replacement):
    with fx_fusion.fusions(), pytest.raises(ValueError, match=r"rms_norm: .*(nobody|my_kernel|rms_norm)") as error:
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=replacement)
    assert (
        "does not exist" in str(error.value) or "no attribute" in str(error.value) or "not defined" in str(error.value)
    )


def test_what_only_this_machine_lacks_is_no_error():
    def elsewhere(x, weight, eps):
        raise RuntimeError("no GPU here")

    def imported(x, weight, eps):
        if x.is_cuda:
            import nobody  # noqa: F401

            return torch.ops.nobody.rms_norm(x, weight, eps)
        return patterns.rms_norm(x, weight, eps)

    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=elsewhere, name="elsewhere")
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=imported, name="imported")
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=patterns.my_rms_norm, name="existing")


def test_attention_without_dropout_is_not_random():
    def attention(q, k, v, p):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p)

    example = tuple(torch.empty(2, 3, 5, 8) for _ in range(3))
    for p, error in ((0.0, None), (0.1, "draws random numbers")):
        with fx_fusion.fusions():
            pattern = eval("lambda q, k, v: attention(q, k, v, p)", {"attention": attention, "p": p})
            if error is None:
                fx_fusion.register_fusion(pattern=pattern, replacement=pattern, example=example)
                continue
            with pytest.raises(ValueError, match=error):
                fx_fusion.register_fusion(pattern=pattern, replacement=pattern, example=example)


def test_a_pattern_that_reads_memory_by_strides():
    with fx_fusion.fusions(), pytest.raises(ValueError, match="by strides"):
        fx_fusion.register_fusion(
            pattern=lambda x: x.as_strided((4,), (1,)).exp(), replacement=lambda x: x.exp(), example=(torch.empty(8),)
        )


def test_grouped_attention_in_the_place_of_repeated_heads():
    """Keys and values are repeated for each group of queries; the replacement takes them as they are."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def repeated(q, k, v, mask, scale: float):
        b, h, s, d = k.shape
        groups = q.shape[1] // h
        k, v = (t[:, :, None].expand(b, h, groups, s, d).reshape(b, h * groups, s, d) for t in (k, v))
        return sdpa(q, k, v, attn_mask=mask, scale=scale)

    def grouped(q, k, v, mask, scale):
        return sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    def model(q, k, v, mask):
        k, v = (t.repeat_interleave(4, 1) for t in (k, v))
        return sdpa(q, k, v, attn_mask=mask, scale=0.25).sin()

    tensors = (torch.randn(2, 8, 1, 32), torch.randn(2, 2, 64, 32), torch.randn(2, 2, 64, 32))
    mask = torch.rand(2, 1, 1, 64) > 0.2
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=repeated, replacement=grouped, name="grouped", example=(*tensors, mask, 0.17))
        report = assert_fuses(model, (*tensors, mask), count=1)
    assert report.fused[0].reading["numbers"] == {"scale": 0.25}
