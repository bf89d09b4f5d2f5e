"""Patterns that people write, each with several spellings of a model that computes it, and what is nearly it.

An entry gives tensors for a model; the numbers that are captured are those that stand in the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

T, D = 6, 32


@dataclass(frozen=True)
class Entry:
    """
    Attributes:
        pattern: as a user would write it.
        models: spellings, by name; each takes the tensors of `args`.
        args: makes tensors for the models.
        numbers: what is to be captured.
        example: for the registration, where the pattern needs one.
        others: look-alikes, that must be left alone.
        wrong: changes of the pattern's results (or numbers) that make a wrong replacement.
    """

    pattern: Callable[..., Any]
    models: Mapping[str, Callable[..., Any]]
    args: Callable[[], tuple[torch.Tensor, ...]]
    numbers: Mapping[str, float] = field(default_factory=dict)
    example: tuple[Any, ...] | None = None
    others: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    wrong: Callable[..., Any] | None = None


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


# --- norms -----------------------------------------------------------------------------------------------------------


def layer_norm(x, weight, bias, eps: float):
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def ln_by_hand(x, w, b):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + 1e-5) * w + b


def ln_by_moments(x, w, b):
    mean, square = x.mean(-1, keepdim=True), (x * x).mean(-1, keepdim=True)
    return w * ((x - mean) / torch.sqrt(square - mean * mean + 1e-5)) + b


def ln_by_var(x, w, b):
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return torch.addcmul(b, (x - mean) / (var + 1e-5).sqrt(), w)


def ln_with_unbiased_variance(x, w, b):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * w + b


def skip_layer_norm(x, residual, weight, bias, eps: float):
    added = x + residual
    return F.layer_norm(added, (added.shape[-1],), weight, bias, eps), added


def skip_in_place(x, r, w, b):
    r = r.clone().add_(x)
    return ln_by_hand(r, w, b), r


def group_norm_silu(x, weight, bias, groups: int, eps: float):
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def gn_by_hand(x, w, b):
    y = x.unflatten(1, (4, -1)).flatten(2)
    y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, correction=0, keepdim=True) + 1e-6)
    y = y.view_as(x) * w[:, None, None] + b[:, None, None]
    return y / (1 + torch.exp(-y))


# --- attention -------------------------------------------------------------------------------------------------------


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def attention_quantised(q, k, v, scale):
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def heads():
    return rand(2, 4, 6, 16), rand(2, 4, 6, 16), rand(2, 4, 6, 16)


def attention_quantised_by_hand(q, k, v, s):
    y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).reshape(2, 6, 64)
    return torch.clamp(y * s.reciprocal(), min=-448.0, max=448.0).to(torch.float8_e4m3fn)


# --- quantisation ----------------------------------------------------------------------------------------------------


def rms(x, w, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


def rms_norm_float8(x, weight, scale, eps: float):
    return (rms(x, weight, eps) / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def rms_float8_by_library(x, w, s):
    y = F.rms_norm(x, (x.shape[-1],), w, 1e-6)
    return torch.minimum(torch.maximum(y / s, torch.tensor(-448.0)), torch.tensor(448.0)).to(torch.float8_e4m3fn)


def silu_mul_float8(gate, up, scale):
    return (F.silu(gate) * up / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def silu_mul_float8_by_hand(g, u, s):
    return (u * g * torch.sigmoid(g) / s).clamp_max(448).clamp_min(-448).to(torch.float8_e4m3fn)


def dynamic_linear(x, weight, weight_scale):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    q = (x / scale).round().clamp(-128, 127).to(torch.int8)
    return torch._int_mm(q, weight).to(x.dtype) * scale * weight_scale


def dynamic_linear_by_max(x, w, ws):
    scale = x.abs().max(dim=-1, keepdim=True).values.clamp_min(1e-5).div(127)
    q = torch.round(torch.clamp(x / scale, -128, 127)).to(torch.int8)
    return scale * (torch._int_mm(q, w).float() * ws)


def dynamic_linear_floored(x, w, ws):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return torch._int_mm((x / scale).floor().clamp(-128, 127).to(torch.int8), w).to(x.dtype) * scale * ws


# --- activations -----------------------------------------------------------------------------------------------------


def gpt_oss_swiglu(gate, up, alpha: float, limit: float):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def gpt_oss_by_hand(g, u):
    g = torch.minimum(g, torch.tensor(7.0))
    u = u.clamp(min=-7.0).clamp(max=7.0)
    return g / (1 + torch.exp(g * -1.702)) * (1 + u)


def gpt_oss_by_where(g, u):
    g = torch.where(g > 7.0, 7.0, g)
    u = F.hardtanh(u, -7.0, 7.0)
    return torch.addcmul(g * torch.sigmoid(1.702 * g), u, g * torch.sigmoid(1.702 * g))


def gpt_oss_with_two_limits(g, u):
    g = g.clamp(max=7.0)
    return (u.clamp(-6.0, 7.0) + 1) * g * torch.sigmoid(1.702 * g)


def gelu(x, y):
    return F.gelu(x) * y


def gelu_by_erfc(x, y):
    return x * 0.5 * torch.erfc(-x * 0.7071067811865476) * y


def gelu_by_erf(x, y):
    return y * (0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))))


def relu_linear(x, weight, bias):
    return F.relu(F.linear(x, weight, bias))


# --- softmax ---------------------------------------------------------------------------------------------------------


def softmax(x, scale: float):
    return F.softmax(x * scale, -1)


def softmax_plain(x):
    e = (x * 0.125).exp()
    return e / e.sum(-1, keepdim=True)


def softmax_shifted(x):
    y = x / 8
    e = torch.exp(y - y.max(-1, keepdim=True).values)
    return e * e.sum(-1, keepdim=True).reciprocal()


def log_softmax(x, y):
    return F.log_softmax(x, -1) * y


def router(x, k: int):
    weights, experts = F.softmax(x, -1).topk(k, -1)
    return weights / weights.sum(-1, keepdim=True), experts


def router_by_hand(x):
    e = torch.exp(x - x.amax(-1, keepdim=True))
    probabilities = e / e.sum(-1, keepdim=True)
    top = torch.topk(probabilities, 2, dim=1)
    return top.values * top.values.sum(-1, keepdim=True).reciprocal(), top.indices


def router_of_logits(x):
    """Chooses by the logits: ties, and what rounds to zero, may be chosen otherwise."""
    logits, experts = x.topk(2, -1)
    return F.softmax(logits, -1), experts


ENTRIES: dict[str, Entry] = {
    "layer_norm": Entry(
        layer_norm,
        {
            "itself": lambda x, w, b: F.layer_norm(x, (D,), w, b, 1e-5),
            "by hand": ln_by_hand,
            "by moments": ln_by_moments,
            "by var_mean": ln_by_var,
        },
        lambda: (rand(T, D), rand(D), rand(D)),
        {"eps": 1e-5},
        others={"unbiased": ln_with_unbiased_variance, "rms": lambda x, w, b: rms(x, w, 1e-5) + b},
        wrong=lambda y: y + 1e-4,
    ),
    "skip_layer_norm": Entry(
        skip_layer_norm,
        {
            "itself": lambda x, r, w, b: (F.layer_norm(x + r, (D,), w, b, 1e-5), x + r),
            "in place": skip_in_place,
            "by moments": lambda x, r, w, b: (ln_by_moments(r + x, w, b), r + x),
        },
        lambda: (rand(T, D), rand(T, D), rand(D), rand(D)),
        {"eps": 1e-5},
        others={"rounded": lambda x, r, w, b: (ln_by_hand((x + r).round(), w, b), (x + r).round())},
        wrong=lambda y: (y[0], y[1] * 1.001),
    ),
    "group_norm_silu": Entry(
        group_norm_silu,
        {
            "itself": lambda x, w, b: F.silu(F.group_norm(x, 4, w, b, 1e-6)),
            "by hand": gn_by_hand,
        },
        lambda: (rand(2, 8, 5, 7), rand(8), rand(8)),
        {"groups": 4, "eps": 1e-6},
        example=(torch.empty(2, 12, 3, 5), torch.empty(12), torch.empty(12), 6, 0.3),
        others={"gelu": lambda x, w, b: F.gelu(F.group_norm(x, 4, w, b, 1e-6))},
        wrong=lambda y: y.abs(),
    ),
    "attention": Entry(
        attention,
        {
            "itself": attention,
            "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25),
            "no dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.0) * 1.0,
        },
        heads,
        example=(torch.empty(2, 3, 5, 8), torch.empty(2, 3, 7, 8), torch.empty(2, 3, 7, 8)),
        others={
            "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "other scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        },
        wrong=lambda y: y.flip(-1),
    ),
    "attention_quantised": Entry(
        attention_quantised,
        {"itself": attention_quantised, "by hand": attention_quantised_by_hand},
        lambda: (*heads(), torch.tensor([0.02])),
        example=(*(torch.empty(2, 3, 5, 8) for _ in range(3)), torch.empty(1)),
        others={
            "no clamp": lambda q, k, v, s: (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) / s).to(
                torch.float8_e4m3fn
            )
        },
        wrong=lambda y: (y.float() * 1.5).to(torch.float8_e4m3fn),
    ),
    "rms_norm_float8": Entry(
        rms_norm_float8,
        {
            "itself": lambda x, w, s: rms_norm_float8(x, w, s, 1e-6),
            "by library": rms_float8_by_library,
            "inverse": lambda x, w, s: (rms(x, w, 1e-6) * (1 / s)).clamp(-448, 448).to(torch.float8_e4m3fn),
        },
        lambda: (rand(T, D), rand(D), torch.tensor([0.01])),
        {"eps": 1e-6},
        example=(torch.empty(5, 16), torch.empty(16), torch.empty(1), 0.3),
        others={"e5m2": lambda x, w, s: (rms(x, w, 1e-6) / s).clamp(-448, 448).to(torch.float8_e5m2)},
        wrong=lambda y: (y.float() * 1.5).to(torch.float8_e4m3fn),
    ),
    "silu_mul_float8": Entry(
        silu_mul_float8,
        {
            "itself": silu_mul_float8,
            "by hand": silu_mul_float8_by_hand,
            "packed": lambda g, u, s: silu_mul_float8(*torch.cat([g, u], -1).sin().chunk(2, -1), s),
        },
        lambda: (rand(T, D), rand(T, D), torch.tensor([0.01])),
        example=(torch.empty(5, 16), torch.empty(5, 16), torch.empty(1)),
        others={"range": lambda g, u, s: (F.silu(g) * u / s).clamp(-240, 240).to(torch.float8_e4m3fn)},
        wrong=lambda y: (y.float() * 1.5).to(torch.float8_e4m3fn),
    ),
    "dynamic_linear": Entry(
        dynamic_linear,
        {"itself": dynamic_linear, "by max": dynamic_linear_by_max},
        lambda: (rand(24, 32), torch.randint(-100, 100, (32, 16), dtype=torch.int8), torch.rand(16)),
        example=(torch.empty(20, 32), torch.zeros(32, 24, dtype=torch.int8), torch.empty(24)),
        others={"floored": dynamic_linear_floored},
        wrong=lambda y: y * 1.01,
    ),
    "gpt_oss_swiglu": Entry(
        gpt_oss_swiglu,
        {
            "itself": lambda g, u: gpt_oss_swiglu(g, u, 1.702, 7.0),
            "by hand": gpt_oss_by_hand,
            "by where": gpt_oss_by_where,
        },
        lambda: (rand(T, D) * 8, rand(T, D) * 8),
        {"alpha": 1.702, "limit": 7.0},
        others={
            "two limits": gpt_oss_with_two_limits,
            "no limit": lambda g, u: (u + 1) * g * torch.sigmoid(1.702 * g),
        },
        wrong=lambda y: y * 1.001,
    ),
    "gelu": Entry(
        gelu,
        {"itself": gelu, "by erfc": gelu_by_erfc, "by erf": gelu_by_erf},
        lambda: (rand(T, D), rand(T, D)),
        others={"tanh": lambda x, y: F.gelu(x, approximate="tanh") * y},
        wrong=lambda y: torch.where(y.abs() < 1e-3, 0.0, y),
    ),
    "relu_linear": Entry(
        relu_linear,
        {
            "itself": relu_linear,
            "clamp": lambda x, w, b: torch.addmm(b, x, w.t()).clamp(min=0),
            "maximum": lambda x, w, b: torch.maximum(x @ w.mT + b, torch.zeros(())),
            "where": lambda x, w, b: (lambda y: torch.where(y < 0, 0.0, y))(F.linear(x, w, b)),
        },
        lambda: (rand(T, D), rand(16, D), rand(16)),
        example=(torch.empty(5, 16), torch.empty(24, 16), torch.empty(24)),
        others={"leaky": lambda x, w, b: F.leaky_relu(F.linear(x, w, b), 1e-6)},
        wrong=lambda y: y.clamp(max=1e3),
    ),
    "softmax": Entry(
        softmax,
        {
            "itself": lambda x: F.softmax(x * 0.125, -1),
            "plain": softmax_plain,
            "shifted": softmax_shifted,
        },
        lambda: (rand(T, D),),
        {"scale": 0.125},
        others={"capped": lambda x: (lambda e: e / e.sum(-1, keepdim=True))((x * 0.125).exp().clamp(max=1e9))},
        wrong=lambda y: y + 1e-5,
    ),
    "log_softmax": Entry(
        log_softmax,
        {
            "itself": log_softmax,
            "logsumexp": lambda x, y: y * (x - x.logsumexp(-1, keepdim=True)),
            "of softmax": lambda x, y: F.softmax(x, -1).log() * y,
            "plain": lambda x, y: (x - x.exp().sum(-1, keepdim=True).log()) * y,
        },
        lambda: (rand(T, D), rand(T, D)),
        others={"base 2": lambda x, y: F.softmax(x, -1).log2() * y},
        wrong=lambda y: y.clamp(min=-50.0),
    ),
    "router": Entry(
        router,
        {
            "itself": lambda x: router(x, 2),
            "by hand": router_by_hand,
        },
        lambda: (rand(T, 8),),
        {"k": 2},
        example=(torch.empty(5, 16), 3),
        others={"of logits": router_of_logits},
        wrong=lambda y: (y[0] * 1.001, y[1]),
    ),
    "one tensor twice": Entry(
        lambda x, y: (x.exp() * y).sin(),
        {"square": lambda x: (x.exp() * x).sin(), "mirrored": lambda x: torch.sin(torch.mul(x, torch.exp(x)))},
        lambda: (rand(T, D),),
        others={"another": lambda x: (x.exp() * x.exp()).sin()},
        wrong=lambda y: y * 1.01,
    ),
}
