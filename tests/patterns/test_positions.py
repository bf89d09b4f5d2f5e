"""Positions are what the call says they are by movement; tables keep every row. Whatever else happens to them stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from prologue import HEAD_DIM, HIDDEN, POSITIONS, SLOTS, Prologue, arguments
from rowwise import assert_as_eager

TOKENS = 6
MOVED: dict[str, type[Prologue]] = {}


class OneAxis(Prologue):
    """positions [T], a table [P, D]"""

    def angles(self, positions):
        cos, sin = self.rows(positions[0]).chunk(2, -1)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def rows(self, positions):
        return self.table()[self.moved(positions)]

    def table(self):
        return self.cos_sin_cache

    def moved(self, positions):
        return positions


def given(tokens=TOKENS, low=-POSITIONS, high=POSITIONS):
    """Positions from either end, the first and the last row among them."""
    x, slots = torch.randn(tokens, HIDDEN), torch.randperm(SLOTS)[:tokens]
    caches = arguments()[3:]
    positions = torch.randint(low, high, (3, tokens))
    edges = torch.tensor([high - 1, low, max(low, -1), 0])
    positions[:, : len(edges)] = edges[:tokens]
    return x, positions, slots, *caches


def with_positions(moved):
    return type("Moved", (OneAxis,), {"moved": lambda self, positions: moved(positions)})


def with_table(table):
    return type("Table", (OneAxis,), {"table": lambda self: table(self.cos_sin_cache)})


def set_first(positions):
    positions = positions.clone()
    positions[0] = 0
    return positions


def set_last(positions):
    positions = positions.clone()
    positions[-1] = TOKENS - 1
    return positions


def put(positions):
    return positions.index_put((torch.tensor([1, 3]),), torch.tensor([1, 3]))


def scattered(positions):
    return positions.scatter(0, torch.tensor([0, 2]), torch.tensor([0, 2]))


#: What may happen to positions. At 0, 1, 2, … most of it does nothing.
POSITIONS_OF = {
    "first_is_zero": set_first,
    "last_is_its_own_number": set_last,
    "put": put,
    "scattered": scattered,
    "filled": lambda p: p.masked_fill(torch.arange(TOKENS) == 2, 2),
    "where": lambda p: torch.where(torch.arange(TOKENS) < 3, torch.arange(TOKENS), p),
    "at_least": lambda p: torch.maximum(p, torch.arange(TOKENS)),
    "clamped": lambda p: p.clamp(0, 20),
    "clamped_below": lambda p: p.clamp_min(0),
    "relu": torch.relu,
    "absolute": lambda p: p.abs() % POSITIONS,
    "kept_positive": lambda p: torch.where(p < 0, 0, p),
    "modulo": lambda p: p % 7,
    "modulo_of_many": lambda p: p % (POSITIONS - 1),
    "halved": lambda p: p // 2,
    "shifted": lambda p: (p + 1) % POSITIONS,
    "doubled": lambda p: p * 2 % POSITIONS,
    "by_a_table_of_numbers": lambda p: torch.arange(2 * POSITIONS).flip(0)[p] % POSITIONS,
    "by_a_list": lambda p: torch.tensor([0, 1, 2, 3, 4, 5, *[7] * (POSITIONS - 6)])[p],
    "sorted": lambda p: p.sort().values,
    "running_maximum": lambda p: p.cummax(0).values,
    "running_sum": lambda p: p.cumsum(0) % POSITIONS,
    "unique_order": lambda p: p[p.argsort()],
    "flipped": lambda p: p.flip(0),
    "rolled": lambda p: p.roll(1),
    "rolled_all_the_way": lambda p: p.roll(TOKENS),
    "chosen": lambda p: p[torch.tensor([0, 1, 2, 3, 5, 4])],
    "gathered": lambda p: p.gather(0, torch.arange(TOKENS - 1, -1, -1)),
    "first_for_all": lambda p: p[:1].expand(TOKENS),
    "repeated": lambda p: p[:3].repeat(2),
    "joined": lambda p: torch.cat([p[:1], p[:-1]]),
    "joined_with_numbers": lambda p: torch.cat([torch.arange(2), p[2:]]),
    "transposed": lambda p: p.view(2, 3).t().reshape(-1),
    "narrow": lambda p: p.to(torch.int32).to(torch.int64),
    "bytes": lambda p: p.remainder(POSITIONS).to(torch.uint8).long(),
}


@pytest.mark.parametrize("name", POSITIONS_OF)
def test_what_happens_to_positions(name):
    report = assert_as_eager(with_positions(POSITIONS_OF[name])(), given(), given())
    assert len(report.fused) == 1, str(report)


#: What may be indexed in place of the table. A position from the end is another row of a part than of the whole.
TABLES = {
    "as_it_is": lambda t: t,
    "first_rows": lambda t: t[:20],
    "last_rows": lambda t: t[20:],
    "without_the_last": lambda t: t[:-1],
    "every_other": lambda t: t[::2],
    "flipped": lambda t: t.flip(0),
    "rolled": lambda t: t.roll(1, 0),
    "halves_exchanged": lambda t: torch.cat([t[20:], t[:20]]),
    "twice": lambda t: torch.cat([t, t]),
    "repeated": lambda t: t.repeat(2, 1),
    "interleaved": lambda t: t.repeat_interleave(2, 0),
    "padded": lambda t: F.pad(t, (0, 0, 0, 3)),
    "chosen": lambda t: t[torch.arange(POSITIONS).flip(0)],
    "by_a_list": lambda t: t[torch.tensor([1, 0, *range(2, POSITIONS)])],
    "rows_exchanged": lambda t: t.view(2, POSITIONS // 2, HEAD_DIM).transpose(0, 1).reshape(POSITIONS, HEAD_DIM),
    "one_row_changed": lambda t: torch.cat([torch.ones(1, HEAD_DIM), t[1:]]),
    "copied": lambda t: t.clone(),
    "all_rows": lambda t: t[0:POSITIONS],
    "in_three_dimensions": lambda t: t.view(POSITIONS, 2, HEAD_DIM // 2).flatten(1),
    "wider_rows": lambda t: torch.cat([t, t], -1)[:, :HEAD_DIM],
    "columns_exchanged": lambda t: t.roll(HEAD_DIM // 2, 1),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_happens_to_the_table(name):
    model = with_table(TABLES[name])()
    rows = TABLES[name](model.cos_sin_cache).shape[0]
    report = assert_as_eager(model, given(low=-rows, high=rows), given(low=-rows, high=rows))
    assert len(report.fused) == 1, str(report)


@pytest.mark.parametrize("name", ["as_it_is", "copied", "all_rows", "in_three_dimensions"])
def test_a_table_with_all_its_rows_is_the_table(name):
    report = assert_as_eager(with_table(TABLES[name])(), given())
    assert report.fused[0].facts["angles"] == "table", str(report)


@pytest.mark.parametrize("restricted", ["first_rows", "flipped", "repeated", "chosen"])
@pytest.mark.parametrize("changed", ["first_is_zero", "modulo", "sorted", "flipped"])
def test_both(restricted, changed):
    class Both(OneAxis):
        def table(self):
            return TABLES[restricted](self.cos_sin_cache)

        def moved(self, positions):
            return POSITIONS_OF[changed](positions)

    rows = TABLES[restricted](Both().cos_sin_cache).shape[0]
    report = assert_as_eager(Both(), given(low=-rows, high=rows))
    assert len(report.fused) == 1, str(report)


# --- how rows are taken -----------------------------------------------------------------------------------------------


class Embedding(OneAxis):
    def rows(self, positions):
        return F.embedding(self.moved(positions), self.table())


class IndexSelect(OneAxis):
    def rows(self, positions):
        return self.table().index_select(0, self.moved(positions))


class Gather(OneAxis):
    def rows(self, positions):
        return self.table().gather(0, self.moved(positions).unsqueeze(1).expand(-1, HEAD_DIM))


class FromColumns(OneAxis):
    """The table lies on its side."""

    def rows(self, positions):
        return self.table().t()[:, self.moved(positions)].t()


class TwoLookups(OneAxis):
    """Cosines and sines for themselves, from halves of one table."""

    def rows(self, positions):
        half, moved = HEAD_DIM // 2, self.moved(positions)
        return torch.cat([self.table()[:, :half][moved], self.table()[:, half:][moved]], -1)


class OtherPositions(OneAxis):
    """Sines at other positions than cosines."""

    def rows(self, positions):
        half = HEAD_DIM // 2
        return torch.cat([self.table()[:, :half][positions], self.table()[:, half:][self.moved(positions)]], -1)


class LookedUpTwice(OneAxis):
    """Rows are looked up once more, by a table of positions."""

    def rows(self, positions):
        return self.table()[torch.arange(POSITIONS).flip(0)[self.moved(positions)]]


class TokensChosen(OneAxis):
    """Rows change their tokens after they were looked up."""

    def rows(self, positions):
        return self.moved(self.table()[positions])


@pytest.mark.parametrize("cls", [Embedding, IndexSelect, Gather, FromColumns, TwoLookups, LookedUpTwice])
@pytest.mark.parametrize("changed", [None, "first_is_zero", "modulo", "rolled"])
def test_however_rows_are_taken(cls, changed):
    moved = {"moved": lambda self, positions: POSITIONS_OF[changed](positions)} if changed else {}
    report = assert_as_eager(type("Taken", (cls,), moved)(), given(low=0), given(low=0))
    assert len(report.fused) == 1, str(report)


def test_two_lookups_at_different_positions():
    model = type("Taken", (OtherPositions,), {"moved": lambda self, positions: set_first(positions)})()
    report = assert_as_eager(model, given(), given())
    assert len(report.fused) == 1, str(report)


def first_row_is_one(rows):
    rows = rows.clone()
    rows[0] = 1.0
    return rows


@pytest.mark.parametrize("moved", [first_row_is_one, lambda rows: rows.roll(1, 0), lambda rows: rows.flip(0)])
def test_rows_that_change_after_the_lookup(moved):
    report = assert_as_eager(type("Rows", (TokensChosen,), {"moved": lambda self, rows: moved(rows)})(), given())
    assert len(report.fused) == 1, str(report)


# --- three axes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moved",
    [
        lambda p: p,
        lambda p: p.flip(0),
        lambda p: p[torch.tensor([0, 2, 1])],
        lambda p: torch.stack([p[0], p[1], torch.arange(TOKENS)]),
        lambda p: torch.cat([p[:2], torch.zeros(1, TOKENS, dtype=torch.int64)]),
        lambda p: torch.where(torch.arange(3)[:, None] == 1, p[:1], p),
        lambda p: p.cummax(1).values,
        lambda p: p.sort(0).values,
        lambda p: p.clamp_min(0),
    ],
)
def test_axes(moved):
    class Axes(Prologue):
        def angles(self, positions):
            return super().angles(moved(positions))

    report = assert_as_eager(Axes(), given(), given())
    assert len(report.fused) == 1, str(report)


def test_no_slot_is_left_out():
    """Many more tokens than any table of the graph has rows."""
    x, positions, _, *caches = given(tokens=SLOTS)
    report = assert_as_eager(with_table(TABLES["first_rows"])(), (x, positions % 20, torch.randperm(SLOTS), *caches))
    assert len(report.fused) == 1, str(report)
