"""Patterns that people write are found in every spelling, and nothing else is taken for them."""

from __future__ import annotations

import inspect

import pytest
import torch

import fx_fusion
from function_fusions import ops  # noqa: F401  (registers the operations)
from function_fusions.zoo import ENTRIES
from fx_fusion.testing import assert_fuses
from fx_fusion.testing import run as run_fused


def replacement_of(pattern, change=lambda result: result):
    """What computes the pattern, by an operation of somebody's."""
    names = ", ".join(inspect.signature(pattern).parameters)
    tree, mark = torch.utils._pytree.tree_map, torch.ops.own_tests.mark
    space = {"pattern": pattern, "change": change, "mark": mark, "tree": tree}
    return eval(f"lambda {names}: tree(mark, change(pattern({names})))", space)


def registered(entry, change=lambda result: result):
    pattern = entry.pattern
    fx_fusion.register_fusion(
        pattern=pattern, replacement=replacement_of(pattern, change), name="zoo", example=entry.example
    )


def each(attribute):
    pairs = [(name, key) for name, entry in ENTRIES.items() for key in getattr(entry, attribute)]
    return [pytest.param(name, key, id=f"{name}: {key}") for name, key in pairs]


@pytest.mark.parametrize(("name", "spelling"), each("models"))
def test_every_spelling_is_found(name, spelling):
    entry = ENTRIES[name]
    torch.manual_seed(0)
    with fx_fusion.fusions():
        registered(entry)
        report = assert_fuses(entry.models[spelling], entry.args(), count=1)
    assert report.fused[0].reading["numbers"] == pytest.approx(dict(entry.numbers), rel=1e-6)


@pytest.mark.parametrize(("name", "other"), each("others"))
def test_look_alikes_are_left_alone(name, other):
    entry = ENTRIES[name]
    torch.manual_seed(0)
    with fx_fusion.fusions():
        registered(entry)
        report = run_fused(entry.others[other], entry.args()).report
    assert not report.fused
    assert report.declined, "nobody says why"


@pytest.mark.parametrize("name", ENTRIES)
def test_a_wrong_replacement_is_refused(name):
    entry = ENTRIES[name]
    with fx_fusion.fusions(), pytest.raises(ValueError, match=r"allowed for rounding|where that of the pattern is"):
        registered(entry, entry.wrong)
