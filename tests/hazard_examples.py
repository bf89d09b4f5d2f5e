"""Small models that cannot be captured, or not rightly: each with what goes wrong, and its remedy.

``python tests/hazard_examples.py NAME`` captures one of them on a GPU and prints what happened; a process for each,
since what breaks a capture may leave the device's context unusable.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Item(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale.max().item()


class ItemOnDevice(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale.max()


class Nonzero(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return x[keep].sum(0)


class Where(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep.unsqueeze(-1), x, 0).sum(0)


class BooleanStore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(8, 4))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        self.cache[keep] = x[0]
        return self.cache.sum(0)


class MaskedStore(BooleanStore):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        self.cache.copy_(torch.where(keep.unsqueeze(-1), x[0], self.cache))
        return self.cache.sum(0)


class ToHost(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean().cpu()


class StaysOnDevice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean()


class Multiplies(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale


class Indexes(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x[index]


class Copies(nn.Module):
    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + table.to(x.device)


class PlainAttribute(nn.Module):
    """The scale does not move with the model: ``Module.to`` knows parameters and buffers only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class CpuRandom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(4).to(x.device)


class DeviceRandom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(4, device=x.device)


class Pins(nn.Module):
    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + table.pin_memory().to(x.device, non_blocking=True)


class Synchronizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        torch.cuda.synchronize()
        return y * 2


class OneStream(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1) * 2


class StoresIntoArgument(nn.Module):
    def forward(self, x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        cache[slots] = x
        return cache.sum(0)


class StoresIntoBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(16, 4))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        self.cache[slots] = x
        return self.cache.sum(0)


def keep() -> Tensor:
    return torch.arange(8) % 3 > 0


@dataclass(frozen=True)
class Example:
    """`make` gives a module and its arguments on the CPU; `host` are the positions of arguments that stay there.

    effect: what a manual capture does without the check: "breaks" (raises), "stale" (replays old values) or "skips"
    (works by hand, but Inductor's CUDA graphs refuse); several, where it depends on the driver.
    """

    code: str
    effect: str | tuple[str, ...]
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    host: tuple[int, ...]
    remedy: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    remedy_host: tuple[int, ...] = ()


def x() -> Tensor:
    return torch.linspace(-1, 1, 32).view(8, 4)


EXAMPLES: dict[str, Example] = {
    "item": Example(
        "capture.item", "breaks", lambda: (Item(), (x(), torch.ones(3))), (),
        lambda: (ItemOnDevice(), (x(), torch.ones(3))),
    ),
    "nonzero": Example(
        "capture.size_from_data", "breaks", lambda: (Nonzero(), (x(), keep())), (), lambda: (Where(), (x(), keep()))
    ),
    "boolean-store": Example(
        "capture.unsafe_op", "breaks", lambda: (BooleanStore(), (x(), keep())), (),
        lambda: (MaskedStore(), (x(), keep())),
    ),
    "to-host": Example(
        "capture.device_to_host", "breaks", lambda: (ToHost(), (x(),)), (), lambda: (StaysOnDevice(), (x(),))
    ),
    "host-scale": Example(
        "capture.host_input", "stale", lambda: (Multiplies(), (x(), torch.tensor(2.0))), (1,),
        lambda: (Multiplies(), (x(), torch.tensor(2.0))),
    ),
    "host-index": Example(
        "capture.host_input", "breaks", lambda: (Indexes(), (x(), torch.tensor([3, 1]))), (1,),
        lambda: (Indexes(), (x(), torch.tensor([3, 1]))),
    ),
    "host-table": Example(
        "capture.host_to_device", "breaks", lambda: (Copies(), (x(), torch.ones(4))), (1,),
        lambda: (Copies(), (x(), torch.ones(4))),
    ),
    "plain-attribute": Example(
        "capture.host_input", "stale", lambda: (PlainAttribute(), (x(),)), (), lambda: (Buffer(), (x(),))
    ),
    "cpu-random": Example(
        "capture.host_random", ("breaks", "stale"), lambda: (CpuRandom(), (x(),)), (), lambda: (DeviceRandom(), (x(),))
    ),
    "pin-memory": Example(
        "capture.pin_memory", ("breaks", "stale"), lambda: (Pins(), (x(), torch.ones(4))), (1,),
        lambda: (Copies(), (x(), torch.ones(4))),
    ),
    "synchronize": Example(
        "capture.synchronize", "breaks", lambda: (Synchronizes(), (x(),)), (), lambda: (OneStream(), (x(),))
    ),
    "argument-cache": Example(
        "capture.mutated_input", "skips",
        lambda: (StoresIntoArgument(), (x(), torch.zeros(16, 4), torch.arange(8))), (),
        lambda: (StoresIntoBuffer(), (x(), torch.arange(8))),
    ),
}  # fmt: skip


# --- on a GPU -----------------------------------------------------------------------------------------------------


def place(made: tuple[nn.Module, tuple[Tensor, ...]], host: tuple[int, ...]) -> tuple[nn.Module, list[Tensor]]:
    module, args = made
    return module.cuda(), [arg if i in host else arg.cuda() for i, arg in enumerate(args)]


def change(tensors: list[Tensor]) -> None:
    """Another value of each floating-point tensor, in place."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.mul_(-3).add_(0.25)


@torch.no_grad()
def capture_and_replay(module: nn.Module, args: list[Tensor]) -> str:
    """What happened: "breaks: …", "stale", or "right": a replay gives what eager gives, after every input changed."""
    plain = [value for value in vars(module).values() if isinstance(value, Tensor)]
    module(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = module(*args)
    except Exception as error:
        return f"breaks: {type(error).__name__}: {str(error).splitlines()[0]}"
    change([*args, *plain, *module.buffers()])
    other = copy.deepcopy(module)
    other.__dict__.update({name: value for name, value in vars(module).items() if isinstance(value, Tensor)})
    torch.cuda.manual_seed(0)
    expected = other(*(arg.clone() for arg in args))
    torch.cuda.manual_seed(0)
    graph.replay()
    torch.cuda.synchronize()
    return "right" if torch.allclose(out, expected, atol=1e-6) else "stale"


@torch.no_grad()
def skips(module: nn.Module, args: list[Tensor]) -> int:
    """How often Inductor's CUDA graphs refuse."""
    from torch._dynamo.utils import counters

    before = counters["inductor"]["cudagraph_skips"]
    compiled: Any = torch.compile(module, mode="reduce-overhead")
    for _ in range(3):
        compiled(*args)
    return counters["inductor"]["cudagraph_skips"] - before


def main(name: str) -> None:
    """Prints {"example", "remedy"}: what a capture of each did."""
    example = EXAMPLES[name]
    outcome = {"remedy": capture_and_replay(*place(example.remedy(), example.remedy_host))}
    if example.effect == "skips":
        outcome["remedy skips"] = skips(*place(example.remedy(), example.remedy_host))
        outcome["skips"] = skips(*place(example.make(), example.host))
    # Last: it may leave the context unusable.
    outcome["example"] = capture_and_replay(*place(example.make(), example.host))
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1])
