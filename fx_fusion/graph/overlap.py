"""Do two strided regions of one tensor share an element? Decided by arithmetic on sizes and strides alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Dims = Sequence[tuple[int, int]]
"""(size, stride) of each dimension; strides are not negative."""

#: Steps of the search, beyond which the answer is that they may.
_PATIENCE = 10_000


def may_overlap(first: Dims, first_offset: int, second: Dims, second_offset: int) -> bool:
    """False if no element lies in both regions; True if one does, or if that is not found out soon.

    Dimensions that both have, such as blocks and slots, differ by a whole number of steps from one region to the
    other; of the others only how far they reach counts.
    """
    ours, theirs = (Counter((size, stride) for size, stride in dims if size > 1) for dims in (first, second))
    common = sorted((ours & theirs).elements(), key=lambda dim: -dim[1])
    reach = [
        sum((size - 1) * stride for size, stride in (dims - (ours & theirs)).elements()) for dims in (ours, theirs)
    ]
    return _meets(second_offset - first_offset, common, -reach[1], reach[0])


def _meets(distance: int, steps: Dims, low: int, high: int) -> bool:
    """Is there an n within ± (size - 1) for each (size, stride) such that distance + Σ n · stride is within bounds?"""
    patience = _PATIENCE
    stack = [(distance, 0)]
    while stack:
        distance, depth = stack.pop()
        patience -= 1
        if patience < 0:
            return True
        if depth == len(steps):
            if low <= distance <= high:
                return True
            continue
        size, stride = steps[depth]
        rest = sum((n - 1) * s for n, s in steps[depth + 1 :])
        # distance + n · stride must come within `rest` of the bounds.
        fewest = max(1 - size, -((distance + rest - low) // stride)) if stride else 0
        most = min(size - 1, (high + rest - distance) // stride) if stride else 0
        stack.extend((distance + n * stride, depth + 1) for n in range(fewest, min(most, fewest + _PATIENCE) + 1))
    return False
