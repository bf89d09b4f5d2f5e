"""Two fusions that come with the package and are registered on request, each from plain functions.

    fx_fusion.register_fusion(fx_fusion.SwiGLU())
    fx_fusion.register_fusion(fx_fusion.QkNormRope())

They are not registered by default: looking for them costs compile time in every model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.fusion import FunctionFusion, Match
from fx_fusion.kernels.operation import KernelUnavailable
from fx_fusion.kernels.qk_norm_rope_cache import reference
from fx_fusion.kernels.qk_norm_rope_cache.operation import qk_norm_rope_cache
from fx_fusion.kernels.swiglu import operation as swiglu
from fx_fusion.kernels.target import Target


def _choose(name: str, kernel: str, target: Target) -> str:
    """``reference`` anywhere, ``triton`` on a GPU; on a CPU nothing is faster than Inductor."""
    if kernel == "reference":
        return kernel
    if target.platform == "cpu" and kernel == "triton":
        raise KernelUnavailable(f"fx_fusion.kernel='triton' cannot serve {name}: Triton kernels run on GPUs")
    if target.platform == "cpu" or kernel == "aiter":
        raise Decline(
            "contract.kernel", f"no {'fast' if kernel == 'auto' else kernel} kernel of {name} on {target.name}"
        )
    return "triton"


def _silu_and_multiply(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu.reference(gate, up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.fx_fusion.swiglu(gate, up)


class SwiGLU(FunctionFusion):
    """``silu(gate) * up`` of one packed or two separate projections, in one launch.

    On a CPU, ``kernel="auto"`` recognises and rewrites nothing, as for the built-in fusion; ``"reference"`` rewrites.
    """

    def __init__(self) -> None:
        example = (torch.empty(5, 16), torch.empty(5, 16))
        super().__init__(_silu_and_multiply, _swiglu, name="swiglu", example=example)

    def choose(self, match: Match, kernel: str, target: Target) -> str:
        return _choose(self.name, kernel, target)

    def rewrite(self, graph: Graph, match: Match, kernel: str) -> None:
        self.insert(graph, match, _silu_and_multiply if kernel == "reference" else _swiglu)


def _norm_and_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, is_neox: bool
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor) -> Tensor:
        y = reference.norm_rope(x[None], weight, eps, False, cos[None], sin[None], x.shape[-1], is_neox)
        return y[0].to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


@torch.library.custom_op("fx_fusion::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, is_neox: bool
) -> tuple[Tensor, Tensor]:
    """RMS-normalise and rotate every head of q [T, Hq, D] and k [T, Hk, D] by cos and sin [T, D / 2]; no store.

    On a GPU by the kernel of :func:`fx_fusion.qk_norm_rope_cache`, whose slots are all negative: it stores nothing.
    """
    if q.device.type != "cuda":
        q_out, k_out = _norm_and_rotate(q, k, q_weight, k_weight, cos, sin, eps, is_neox)
        return q_out.contiguous(), k_out.contiguous()
    nowhere = k.new_empty(1, 1, *k.shape[1:])
    slots = torch.full((1, k.shape[0]), -1, dtype=torch.int64, device=k.device)
    q_out, k_out = qk_norm_rope_cache(
        q[None], k[None], k[None], q_weight, k_weight, cos[None], sin[None], None, slots, None, nowhere, nowhere,
        q_eps=eps, k_eps=eps, rotary_dim=q.shape[-1], is_neox=is_neox, axes=[0] * (q.shape[-1] // 2),
        skip_negative_slots=True, return_k=True, implementation="triton",
    )  # fmt: skip
    return q_out[0], k_out[0]


@qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, is_neox: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.fx_fusion.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, is_neox)


class QkNormRope(FunctionFusion):
    """RMSNorm and rotation of query and key heads where no cache store can be seen: engines whose store is opaque.

    q is [T, Hq, D], k [T, Hk, D], cos and sin are rows [T, D / 2]. The built-in fusion, registered before, takes the
    layers whose stores it can read.
    """

    def __init__(self) -> None:
        heads = (torch.empty(5, 4, 16), torch.empty(5, 3, 16))
        example = (*heads, torch.empty(16), torch.empty(16), torch.empty(5, 8), torch.empty(5, 8), 0.3, True)
        super().__init__(_norm_and_rotate, _qk_norm_rope, name="qk_norm_rope", example=example)

    def choose(self, match: Match, kernel: str, target: Target) -> str:
        return _choose(self.name, kernel, target)

    def rewrite(self, graph: Graph, match: Match, kernel: str) -> None:
        self.insert(graph, match, _norm_and_rotate if kernel == "reference" else _qk_norm_rope)
