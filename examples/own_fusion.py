"""A model file that brings its own fusion and its own kernel: a Triton kernel on a GPU, plain PyTorch on a CPU.

    python examples/own_fusion.py

The pattern says what is computed; how the model spells it does not matter. fx_fusion proves every match in float64, and
compares the kernel with the pattern before it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fx_fusion


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The pattern: RMSNorm, then a sigmoid gate."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (y * torch.sigmoid(gate.float())).to(x.dtype)


@torch.library.custom_op("own_fusion::gated_norm", mutates_args=())
def gated_norm_kernel(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The kernel: one program a row on a GPU."""
    if x.device.type != "cuda":
        return gated_norm(x, gate, weight, eps).contiguous()
    from own_fusion_kernel import launch

    return launch(x, gate, weight, eps)


@gated_norm_kernel.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@fx_fusion.register_fusion(pattern=gated_norm)
def fused_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What takes the pattern's place in the graph."""
    return gated_norm_kernel(x, gate, weight, eps)


class Block(nn.Module):
    """Spells the pattern its own way, and knows nothing of the fusion."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.proj, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        norm = nn.functional.rms_norm(y, (y.shape[-1],), self.weight, self.eps)
        return x + norm / (1 + torch.exp(-self.gate(x)))


def main() -> None:
    """Compile, compare with eager, print the report."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(Block(64, 1e-6), Block(64, 1e-5), Block(64, 1e-5)).to(device)
    x = torch.randn(4, 64, device=device)
    with torch.no_grad():
        expected = model(x)
        actual = torch.compile(model, backend="fx_fusion")(x)
    torch.testing.assert_close(actual, expected)
    print(fx_fusion.last_report())


if __name__ == "__main__":
    main()
