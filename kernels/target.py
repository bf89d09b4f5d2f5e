"""What a kernel is asked: can it run here, and may it serve this call? Each answers with a reason, or None for yes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A place to run: ``cpu``, ``cuda``, ``hip``, or an architecture such as ``gfx942`` or ``sm_90``."""

    name: str

    @property
    def platform(self) -> str:
        """``cpu``, ``cuda`` or ``hip``."""
        if self.name.startswith("gfx"):
            return "hip"
        return "cuda" if self.name.startswith("sm_") else self.name

    @staticmethod
    def parse(name: str) -> Target:
        target = Target(name)
        if target.platform not in ("cpu", "cuda", "hip"):
            raise ValueError(f"target must be 'cpu', 'cuda', 'hip', 'gfx…' or 'sm_…', got {name!r}")
        return target

    @staticmethod
    def of(device: torch.device) -> Target:
        if device.type != "cuda":
            return Target(device.type)
        return Target("hip" if torch.version.hip else "cuda")


@dataclass(frozen=True)
class Problem:
    """One call, as far as a kernel's contract asks about it. Sizes that are symbolic are None."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    is_neox: bool
    gemma_norm: bool
    q_eps: float | None
    k_eps: float | None
    dtype: torch.dtype
    cache_dtype: torch.dtype
    weight_dtypes: tuple[torch.dtype | None, torch.dtype | None]
    angle_dtype: torch.dtype
    packed_qkv: bool
    """q, k and v are consecutive columns of one contiguous tensor, and all that it has."""
    packed_table: bool
    """cos and sin are the two halves of one contiguous table."""
    positions_dtype: torch.dtype | None
    num_axes: int
    axes: tuple[int, ...]
    slots_dtype: torch.dtype
    separate_blocks: bool
    per_sequence_cache: bool
    cache_stride: tuple[int | None, ...]
    return_k: bool
    skip_negative_slots: bool
    block_size: int | None = None
    """Slots of a block, where a block and an offset address the cache; None if unknown."""
    scaled: bool = False
    """k or v is divided by a scale as it is stored."""
    scale_on_device: bool = False
    """A scale is a tensor that is read at every call."""
    num_tokens: int | None = None
    """Contracts do not ask for it; which kernel is fastest depends on it."""


@dataclass(frozen=True)
class Kernel:
    """One implementation: where it runs, and what it serves."""

    name: str
    unavailable: Callable[[Target], str | None]
    refuses: Callable[[Problem, Target], str | None]

    def reason_against(self, problem: Problem, target: Target) -> str | None:
        return self.unavailable(target) or self.refuses(problem, target)


def mrope_section(axes: tuple[int, ...]) -> tuple[tuple[int, ...], bool] | None:
    """(sections, interleaved) that give each pair its axis as Qwen's mRoPE does, or None if nothing does.

    Sectioned: consecutive runs of pairs. Interleaved: pair i takes axis ``i % 3`` while ``i < 3 * section[i % 3]``,
    else axis 0 (ROCm/aiter, ``fused_qk_norm_mrope_3d_cache_pts_quant_shuffle``).
    """
    sections = tuple(axes.count(axis) for axis in range(3))
    runs = tuple(axis for axis in range(3) for _ in range(sections[axis]))
    if axes == runs:
        return sections, False
    interleaved = tuple(i % 3 if i % 3 and i < 3 * sections[i % 3] else 0 for i in range(len(axes)))
    return (sections, True) if axes == interleaved else None
