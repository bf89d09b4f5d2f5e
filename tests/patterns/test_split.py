"""Columns as heads: whole, consecutive within, evenly spaced."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph

from fx_fusion.decline import Decline
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads, expected_columns, read_heads, take_heads

DATA = Graph().placeholder("data")


DESCRIBED = {
    "first": Heads(4, 16, 0, 16, 64),
    "later": Heads(2, 16, 64, 16, 128),
    "gated": Heads(4, 16, 0, 32, 128),
    "gated, second half": Heads(2, 16, 16, 32, 64),
    "one head": Heads(1, 8, 3, 8, 20),
}


@pytest.mark.parametrize("heads", DESCRIBED.values(), ids=DESCRIBED)
def test_reads_back_what_it_describes(heads):
    columns = expected_columns(heads).reshape(-1)
    assert read_heads(columns, heads.head_dim, heads.width, DATA) == heads
    data = torch.arange(3 * heads.width).reshape(3, heads.width)
    assert torch.equal(take_heads(data, heads).reshape(3, -1), data[:, columns])


def test_part_of_a_head():
    with pytest.raises(Decline, match="40 columns are read, which is no multiple of head_dim 16") as declined:
        read_heads(torch.arange(40), 16, 64, DATA)
    assert declined.value.code == "split.heads"


@pytest.mark.parametrize(
    "columns",
    [
        torch.cat([torch.arange(16), torch.arange(32, 64)]),
        torch.arange(0, 64, 2),
        torch.cat([torch.arange(15), torch.arange(20, 37)]),
    ],
    ids=["uneven distance", "every other column", "a gap in a head"],
)
def test_columns_that_are_no_heads(columns):
    with pytest.raises(Decline, match="heads of 16 consecutive columns") as declined:
        read_heads(columns, 16, 128, DATA)
    assert declined.value.code == "split.columns"
