"""Any wording of any step, with any other: it fuses, and computes what eager computes.

A few here; ``tests/spellings/run.py`` draws thousands.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from spellings.alternatives import AXES
from spellings.combination import Combination, draw, verdict
from spellings.model import Shape


@st.composite
def combinations(drawn: DrawFn) -> Combination:
    return draw(lambda members: drawn(st.sampled_from(members)))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(combinations())
def test_fuses_and_is_right(combination):
    found = verdict(combination)
    assert found.justified(combination), f"{combination}\n{found.state} {found.code}: {found.message}"


#: Drawn by ``run.py``, and once declined for a wrong reason, or with a crash.
DECLINED = {
    "norm.eps_is_input": "Plain Gated TokensFirst QueryOnly Indexed OneAxis Chunks Flat SameDtype Projected",
    "region.sizes": "Plain Gated TokensFirst Functional Indexed OneAxis Partial Flat SameDtype Projected",
    "rope.output_dtype": "Plain Sizes TokensFirst QueryOnly Indexed OneAxis Upcast Flat Float16Cache Projected",
}


@pytest.mark.parametrize("code", DECLINED)
def test_declines_for_the_right_reason(code):
    chosen = dict(zip(AXES, DECLINED[code].split(), strict=True))
    rounds = code == "rope.output_dtype"
    shape = Shape(4, 2, 16, dtype=torch.bfloat16 if rounds else torch.float32)
    found = verdict(Combination(shape, chosen, "static" if rounds else "dynamic"))
    assert (found.state, found.code) == ("declined", code), found.message
