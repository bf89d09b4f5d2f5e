"""One run of every further family; `make coverage` runs them all, in every phase and dtype."""

from __future__ import annotations

import coverage_table
import pytest
import torch
from models import FAMILIES, FURTHER

DECLINED = {"olmo2": "norm.not_per_head"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FURTHER)
def test_a_decode_step_fuses_and_gives_eagers_logits(family):
    found = coverage_table.report(coverage_table.Case(family, "decode", torch.float32))
    if family in DECLINED:
        assert not found.fused
        assert {layer.code for layer in found.declined} == {DECLINED[family]}
        return
    others = {layer.code for layer in found.declined}
    assert found.fused and others <= {"store.unknown_writer"}, str(found)


def test_the_page_has_a_row_for_every_model():
    rows = [line for line in coverage_table.PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(FAMILIES) + len(FURTHER)
