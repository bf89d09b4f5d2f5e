"""mRoPE: how pairs of lanes are divided among the axes of positions."""

from __future__ import annotations


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
