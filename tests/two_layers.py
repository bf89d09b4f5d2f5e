"""Three prologues one after the other, the second of which clamps its norm: for commands that take a factory."""

from __future__ import annotations

from prologue import Prologue, arguments
from torch import nn


class Clamped(Prologue):
    def norm(self, x, weight):
        return super().norm(x, weight).clamp(-8, 8)


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, positions, slots, *caches):
        for i, layer in enumerate(self.layers):
            x = layer(x, positions, slots, *caches[2 * i : 2 * i + 2])
        return x


def stack(*layers):
    caches = [cache for _ in layers for cache in arguments()[3:]]
    return Stack(*layers), (*arguments()[:3], *caches)


def good():
    return stack(Prologue(), Prologue(), Prologue())


def clamped():
    return stack(Prologue(), Clamped(), Prologue())


def shorter():
    return stack(Prologue(), Prologue())


def no_tuple():
    return Prologue()


not_a_function = 1
