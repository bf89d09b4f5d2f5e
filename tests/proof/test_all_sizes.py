"""A symbol is an extent or the region is refused: each rule, on graphs of symbolic sizes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fx_fusion.decline import Decline
from fx_fusion.graph.operations import aten, prims
from fx_fusion.proof.all_sizes import check_all_sizes

TOKENS, HEADS, DIM, ROWS = 11, 4, 8, 40


def traced(fn, *shapes):
    """The graph of `fn`; of each shape, the extents that are given as strings are symbols."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    numbers = {"T": TOKENS, "B": 3, "P": ROWS}

    def fake(shape, dtype):
        tensor = torch.zeros([numbers.get(size, size) for size in shape], dtype=dtype)
        dynamic = [DimDynamic.DYNAMIC if size in numbers else DimDynamic.STATIC for size in shape]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))

    fakes = [fake(*shape) if isinstance(shape[0], tuple) else fake(shape, torch.float32) for shape in shapes]
    with mode:
        graph = make_fx(fn, decomposition_table={aten.arange.start_step: _iota, aten.arange.default: _iota})(
            *fakes
        ).graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return inputs, graph.output_node().args[0]


def _iota(*args, **kwargs):
    end = args[1] if len(args) > 1 else args[0]
    return prims.iota.default(end, start=0, step=1, dtype=torch.int64, device=torch.device("cpu"), requires_grad=False)


def refusal(fn, *shapes):
    inputs, out = traced(fn, *shapes)
    try:
        check_all_sizes(inputs, [out])
    except Decline as decline:
        return decline
    return None


FLAT = ("T", HEADS * DIM)
ALIKE = {
    "heads": (lambda x: x.view(-1, HEADS, DIM), FLAT),
    "heads_by_size": (lambda x: x.view(x.shape[0], HEADS, DIM), FLAT),
    "heads_first": (lambda x: x.view(-1, HEADS, DIM).transpose(0, 1), FLAT),
    "rows_of_heads": (lambda x: x.reshape(-1, DIM) * 2, FLAT),
    "rows_of_heads_and_back": (lambda x: (x.reshape(-1, DIM) * 2).view(-1, HEADS * DIM), FLAT),
    "sequences": (lambda x: x.view(-1, x.shape[1], HEADS, DIM).transpose(1, 2), ("B", "T", HEADS * DIM)),
    "all_sequences_as_one": (lambda x: x.flatten(0, 1).view(-1, HEADS, DIM), ("B", "T", HEADS * DIM)),
    "norm": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), FLAT),
    "chunks": (lambda x: torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1), FLAT),
    "angles": (lambda x, c: x.view(-1, HEADS, DIM) * c.unsqueeze(1), FLAT, ("T", DIM)),
    "angles_of_positions": (lambda x, c: x * c[None], ("B", "T", DIM), ("T", DIM)),
    "angles_repeated": (lambda x, c: x.flatten(0, 1) * c.repeat(x.shape[0], 1), ("B", "T", DIM), ("T", DIM)),
    "a_weight": (lambda x, w: x * w.expand(x.shape[0], -1), FLAT, (HEADS * DIM,)),
    "ones": (lambda x: x * torch.full((x.shape[0], 1), 1.0), FLAT),
    "zeros_joined": (lambda x: torch.cat([x, torch.full((x.shape[0], 3), 0.0)], -1), FLAT),
    "whole_slice": (lambda x: x[: x.shape[0]] + x[0:], FLAT),
    "lanes_chosen": (lambda x: x[..., torch.arange(HEADS * DIM).flip(0)], FLAT),
    "lanes_masked": (lambda x: torch.where(torch.arange(HEADS * DIM) < 100, x, -x), FLAT),
    "lanes_flipped": (lambda x: x.flip(-1).roll(3, -1), FLAT),
    "pairs": (lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, DIM // 2, 2))), FLAT),
    "stacked": (lambda x: torch.stack([x, x], 1).flatten(0, 1), FLAT),
    "untouched": (lambda x: x, FLAT),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_a_symbol_that_only_counts(name):
    assert refusal(*ALIKE[name]) is None


def where(condition):
    return lambda x: torch.where(condition(x), x, -x)


ODD = {
    "factor": (lambda x: x * (x.shape[0] // 100 + 1), FLAT),
    "summand": (lambda x: x + x.shape[0], FLAT),
    "divisor": (lambda x: x / x.shape[0], FLAT),
    "filled_with": (lambda x: x * torch.full((1,), x.shape[0]), FLAT),
    "mask_by_number": (where(lambda x: (torch.arange(x.shape[0]) < 100)[:, None]), FLAT),
    "mask_by_count": (where(lambda x: torch.arange(HEADS * DIM) < x.shape[0]), FLAT),
    "first_tokens": (lambda x: torch.cat([x[:100], x[100:] * 2]), FLAT),
    "from_a_token_on": (lambda x: x[x.shape[0] // 100 :], FLAT),
    "lanes_from": (lambda x: x.narrow(1, x.shape[0] // 100, DIM), FLAT),
    "lanes_up_to": (lambda x: x[:, : x.shape[0]].sum(-1), FLAT),
    "every_other_token": (lambda x: x[::2], FLAT),
    "one_token": (lambda x: x + x[:1], FLAT),
    "a_certain_token": (lambda x: x + x[5], FLAT),
    "tokens_by_a_list": (lambda x: x[torch.arange(5)], FLAT),
    "rolled": (lambda x: x.roll(15, 0), FLAT),
    "rolled_by_size": (lambda x: x.roll(x.shape[0] // 100, 1), FLAT),
    "flipped": (lambda x: x.flip(0), FLAT),
    "over_tokens": (lambda x: x - x.mean(0, keepdim=True), FLAT),
    "halves": (lambda x: torch.cat([x.view(2, -1, DIM)[1], x.view(2, -1, DIM)[0]]), FLAT),
    "longer": (lambda x: torch.cat([x, x[:1]])[1:], FLAT),
    "joined": (lambda x: torch.cat([x, x]), FLAT),
    "token_by_token": (lambda x: x @ x.t(), FLAT),
    "tokens_before_and_after": (lambda x: torch.cat([x[-1:], x[:-1]]), FLAT),
    "sequences_exchanged": (lambda x: x.transpose(0, 1).reshape(x.shape), ("B", "T", DIM)),
    "numbers_of_tokens": (lambda x: x * torch.arange(x.shape[0])[:, None], FLAT),
    "other_tokens": (lambda x, y: x.flatten(0, 1) + y.transpose(0, 1).flatten(0, 1), ("B", "T", DIM), ("B", "T", DIM)),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_symbol_that_does_more(name):
    found = refusal(*ODD[name])
    assert found is not None and found.code == "region.sizes"
    assert "the size s" in found.found and found.nodes and str(found.nodes[0]) in found.found


def test_what_it_reaches_is_told():
    found = refusal(lambda x: x.neg() * (x.shape[0] // 100 + 1), FLAT)
    assert "reaches mul (aten.mul.Tensor) as a number" in found.found
    found = refusal(lambda x: x.neg().roll(15, 0).neg(), FLAT)
    assert "roll (aten.roll.default) does not treat alike what lies along it" in found.found


def test_what_follows_another_node():
    """A lookup: the tokens of its result are those of its index; what it looks up has rows of its own."""

    def fn(table, index):
        return table[index].chunk(2, -1)[0].unsqueeze(2)

    for rows in ("P", "T", ROWS):
        (table, index), out = traced(fn, (rows, DIM), (("B", "T"), torch.int64))
        (lookup,) = index.users
        check_all_sizes([index], [out], {lookup: (index, 0)})
        with pytest.raises(Decline):
            check_all_sizes([table, index], [out])


def test_a_step_that_follows_must_lie_where_it_says():
    def fn(table, index):
        return table[:, index]

    (_, index), out = traced(fn, (ROWS, DIM), (("T",), torch.int64))
    check_all_sizes([index], [out], {out: (index, 1)})
    with pytest.raises(Decline):
        check_all_sizes([index], [out], {out: (index, 0)})


def test_static_sizes_are_measured_as_they_are():
    inputs, out = traced(lambda x: x.roll(3, 0) * torch.arange(TOKENS)[:, None], (TOKENS, DIM))
    check_all_sizes(inputs, [out])
