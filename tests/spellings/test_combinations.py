"""Any wording of any step, with any other: it fuses, and computes what eager computes.

A few here; ``tests/spellings/run.py`` draws thousands.
"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from spellings.combination import Combination, draw, verdict


@st.composite
def combinations(drawn: DrawFn) -> Combination:
    return draw(lambda members: drawn(st.sampled_from(members)))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(combinations())
def test_fuses_and_is_right(combination):
    found = verdict(combination)
    assert found.justified(combination), f"{combination}\n{found.state} {found.code}: {found.message}"
