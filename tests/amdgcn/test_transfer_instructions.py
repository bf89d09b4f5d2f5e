"""Loads, stores and exchanges of the simulated GPU: what goes where, and what raises."""

from __future__ import annotations

import numpy as np
import pytest

from amdgcn.simulator import transfers
from amdgcn.simulator.assembly import Unsupported
from amdgcn.simulator.memory import AccessError, Arena, Lds
from amdgcn.simulator.transfers import RAW_BUFFER, Memories
from amdgcn.single import run

LANES = np.arange(64)
SIZE = 1024


class Bench:
    """One buffer of 1024 bytes that count, and as much LDS."""

    def __init__(self):
        self.data = np.arange(SIZE).astype(np.uint8)
        self.data[::7] ^= 0xA5
        self.original = self.data.copy()
        self.arena = Arena()
        self.address = self.arena.add(self.data)
        self.memories = Memories(self.arena, Lds(SIZE))
        self.memories.lds.store(np.array([0]), self.data[None])

    def run(self, *lines, length=SIZE, s=None, **registers):
        """The buffer's address in s[0:1], its descriptor in s[4:7]."""
        low, high = self.address & 0xFFFFFFFF, self.address >> 32
        scalars = {0: low, 1: high, 4: low, 5: high, 6: length, 7: RAW_BUFFER, **(s or {})}
        return run(*lines, s=scalars, memories=self.memories, **registers)

    def words(self, offset, count=1):
        return self.original[offset : offset + 4 * count].view(np.uint32).tolist()

    def written(self):
        self.arena.copy_back()
        return np.flatnonzero(self.data != self.original)


@pytest.fixture
def bench():
    return Bench()


# --- widths -------------------------------------------------------------------------------------------------------

LOADS = {"ubyte": 1, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
STORES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
FORMS = {
    "buffer_load_": "{data}, v0, s[4:7], 0 offen offset:32",
    "global_load_": "{data}, v0, s[0:1] offset:32",
    "buffer_store_": "{data}, v0, s[4:7], 0 offen offset:32",
    "global_store_": "v0, {data}, s[0:1] offset:32",
}
LDS_LOADS = {
    "ds_read_u8": 1,
    "ds_read_u16": 2,
    "ds_read_b32": 4,
    "ds_read_b64": 8,
    "ds_read_b96": 12,
    "ds_read_b128": 16,
}
LDS_STORES = {
    "ds_write_b8": 1, "ds_write_b16": 2, "ds_write_b32": 4, "ds_write_b64": 8, "ds_write_b96": 12, "ds_write_b128": 16,
}  # fmt: skip
LOAD_TEXTS = [
    *((form + name, FORMS[form], size) for form in ("buffer_load_", "global_load_") for name, size in LOADS.items()),
    *((name, "{data}, v0 offset:32", size) for name, size in LDS_LOADS.items()),
]  # fmt: skip
STORE_TEXTS = [
    *((form + name, FORMS[form], size) for form in ("buffer_store_", "global_store_") for name, size in STORES.items()),
    *((name, "v0, {data} offset:32", size) for name, size in LDS_STORES.items()),
]  # fmt: skip


def data_registers(size):
    return "v8" if size <= 4 else f"v[8:{7 + size // 4}]"


@pytest.mark.parametrize(("mnemonic", "operands", "size"), LOAD_TEXTS)
def test_loads(bench, mnemonic, operands, size):
    active = 0xFFFF0000FFFFFFFF
    wave = bench.run(
        f"{mnemonic} {operands.format(data=data_registers(size))}", v={0: LANES * 8, 8: 5}, exec_mask=active
    )
    for lane in (0, 1, 31, 48, 63):
        at = 32 + 8 * lane
        expected = bytes(bench.original[at : at + size]) + bytes(-size % 4)
        assert wave.v[8 : 8 + max(1, size // 4), lane].tobytes() == expected
    assert wave.v[8, 32] == 5


@pytest.mark.parametrize(("mnemonic", "operands", "size"), STORE_TEXTS)
def test_stores(bench, mnemonic, operands, size):
    values = {8 + index: 0x01020304 * (index + 1) + LANES for index in range(4)}
    bench.run(f"{mnemonic} {operands.format(data=data_registers(size))}", v={0: LANES * 12, **values}, exec_mask=0b1001)
    stored = bench.memories.lds.load(np.array([0]), SIZE)[0] if mnemonic.startswith("ds") else None
    bench.written()
    stored = bench.data if stored is None else stored
    expected = bench.original.copy()
    for lane in (0, 3):
        data = np.array([values[8 + index][lane] for index in range(4)], np.uint32).view(np.uint8)[:size]
        expected[32 + 12 * lane : 32 + 12 * lane + size] = data
    np.testing.assert_array_equal(stored, expected)


HALVES = {
    "buffer_load_short_d16 v8, v0, s[4:7], 0 offen": (False, True),
    "buffer_load_short_d16_hi v8, v0, s[4:7], 0 offen": (True, True),
    "global_load_short_d16 v8, v0, s[0:1]": (False, True),
    "global_load_short_d16_hi v8, v0, s[0:1]": (True, True),
    "ds_read_u16_d16 v8, v0": (False, True),
    "ds_read_u16_d16_hi v8, v0": (True, True),
    "buffer_store_short_d16_hi v8, v0, s[4:7], 0 offen": (True, False),
    "global_store_short_d16_hi v0, v8, s[0:1]": (True, False),
    "ds_write_b16_d16_hi v0, v8": (True, False),
}


@pytest.mark.parametrize("text", HALVES)
def test_halves(bench, text):
    upper, loads = HALVES[text]
    wave = bench.run(text, v={0: 64, 8: 0xAAAABBBB}, exec_mask=1)
    if loads:
        half = int(bench.original[64:66].view(np.uint16)[0])
        assert wave.v[8, 0] == (half << 16 | 0xBBBB if upper else 0xAAAA0000 | half)
        return
    bench.written()
    data = bench.memories.lds.load(np.array([64]), 2)[0] if text.startswith("ds") else bench.data[64:66]
    assert data.tobytes() == b"\xaa\xaa"


@pytest.mark.parametrize(("suffix", "count"), [("", 1), ("x2", 2), ("x4", 4), ("x8", 8), ("x16", 16)])
def test_scalar_loads(bench, suffix, count):
    target = "s8" if count == 1 else f"s[8:{7 + count}]"
    wave = bench.run(
        f"s_load_dword{suffix} {target}, s[0:1], 0x10", f"s_load_dword{suffix} {target}, s[0:1], s3", s={3: 20}
    )
    assert wave.s[8 : 8 + count] == bench.words(20, count)


def test_global_addresses(bench):
    """A pair of vector registers, which may be negative from a base; or a scalar base."""
    low, high = (np.full(64, part) for part in ((bench.address + 64) & 0xFFFFFFFF, bench.address >> 32))
    wave = bench.run("global_load_dword v8, v[0:1], off offset:-16", v={0: low, 1: high})
    assert wave.v[8, 5] == bench.words(48)[0]


@pytest.mark.parametrize(
    ("text", "offsets"),
    [
        ("ds_read2_b32 v[8:9], v0 offset0:3 offset1:5", (12, 20)),
        ("ds_read2_b64 v[8:11], v0 offset1:4", (0, 32)),
        ("ds_read2st64_b32 v[8:9], v0 offset1:2", (0, 512)),
    ],
)
def test_two_lds_loads(bench, text, offsets):
    wave = bench.run(text, v={0: LANES * 4 % 64})
    size = 2 if "b64" in text else 1
    found = [wave.v[8 + index, 3] for index in range(2 * size)]
    assert found == [word for offset in offsets for word in bench.words(12 + offset, size)]


@pytest.mark.parametrize(
    ("text", "offsets"),
    [
        ("ds_write2_b32 v0, v8, v10 offset0:3 offset1:5", (12, 20)),
        ("ds_write2st64_b64 v0, v[8:9], v[10:11] offset1:1", (0, 512)),
    ],
)
def test_two_lds_stores(bench, text, offsets):
    bench.run(text, v={0: 8, 8: 1, 9: 2, 10: 3, 11: 4}, exec_mask=1)
    size = 2 if "b64" in text else 1
    found = [bench.memories.lds.load(np.array([8 + at]), 4 * size)[0].view(np.uint32).tolist() for at in offsets]
    assert found == [[1, 2][:size], [3, 4][:size]]


# --- bounds -------------------------------------------------------------------------------------------------------


def test_a_buffer_ends_where_its_descriptor_says(bench):
    """Dword by dword: the last of four is out of range, though memory goes on."""
    wave = bench.run("buffer_load_dwordx4 v[8:11], v0, s[4:7], 0 offen", length=60, v={0: 48})
    assert wave.v[8:12, 0].tolist() == [*bench.words(48, 3), 0]
    assert bench.memories.out_of_range == {48}


def test_a_masked_access_does_nothing(bench):
    lines = ("buffer_load_dwordx2 v[8:9], v0, s[4:7], 0 offen offset:16", "buffer_store_dword v2, v0, s[4:7], 0 offen")
    wave = bench.run(*lines, length=0x7FFFFFFE, v={0: 0x80000000, 2: 1, 8: 9, 9: 9})
    assert wave.v[8:10, 0].tolist() == [0, 0]
    assert not len(bench.written())
    assert bench.memories.out_of_range == {0x80000000}


def test_an_offset_does_not_wrap_around(bench):
    wave = bench.run("buffer_load_dword v8, v0, s[4:7], 0 offen offset:32", v={0: -16 & 0xFFFFFFFF})
    assert wave.v[8, 0] == 0
    assert bench.memories.out_of_range == {0xFFFFFFF0}


def test_the_scalar_offset_moves_the_base_but_not_the_end(bench):
    text = "buffer_load_dword v8, v0, s[4:7], s3 offen"
    assert bench.run(text, length=68, s={3: 64}, v={0: 0}).v[8, 0] == bench.words(64)[0]
    assert bench.run(text, length=68, s={3: 64}, v={0: 4}).v[8, 0] == 0


def test_inactive_lanes_are_not_out_of_range(bench):
    bench.run("buffer_load_dword v8, v0, s[4:7], 0 offen", v={0: np.where(LANES == 7, 1 << 31, 0)}, exec_mask=1)
    assert not bench.memories.out_of_range


OUTSIDE = [
    "buffer_load_dword v8, v0, s[4:7], 0 offen",
    "buffer_store_byte v8, v0, s[4:7], 0 offen",
    "global_load_ubyte v8, v0, s[0:1]",
    "global_store_dwordx4 v0, v[8:11], s[0:1]",
    "ds_read_u8 v8, v0",
    "ds_write_b128 v0, v[8:11]",
    "s_load_dword s8, s[0:1], 0x400",
]


@pytest.mark.parametrize("text", OUTSIDE)
def test_outside_every_buffer(bench, text):
    with pytest.raises(AccessError, match=r"outside every buffer|LDS"):
        bench.run(text, length=0x7FFFFFFE, v={0: np.where(LANES == 9, SIZE, 0)})
    assert not len(bench.written())


def test_an_access_that_reaches_over_the_end(bench):
    with pytest.raises(AccessError):
        bench.run("global_load_dwordx2 v[8:9], v0, s[0:1]", v={0: SIZE - 4})


def test_before_the_first_buffer(bench):
    with pytest.raises(AccessError):
        bench.run("global_load_dword v8, v0, s[0:1] offset:-4", v={0: 0})


@pytest.mark.parametrize("word", [{7: 0x27001}, {5: 0x00047F12}, {5: 0x80007F12}])
def test_other_kinds_of_descriptors(bench, word):
    with pytest.raises(Unsupported, match="buffer descriptor"):
        bench.run("buffer_load_dword v8, v0, s[4:7], 0 offen", s=word, v={0: 0})


# --- exchanges ----------------------------------------------------------------------------------------------------


def test_bpermute():
    wave = run(
        "ds_bpermute_b32 v2, v1, v0", v={0: LANES + 100, 1: (LANES ^ 5) * 4 + 1, 2: 7}, exec_mask=~(1 << 3) % (1 << 64)
    )
    for lane in range(64):
        expected = 7 if lane == 3 else 0 if lane ^ 5 == 3 else (lane ^ 5) + 100
        assert wave.v[2, lane] == expected


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_swizzle(width):
    wave = run(f"ds_swizzle_b32 v2, v0 offset:swizzle(SWAP,{width})", v={0: LANES + 100})
    assert wave.v[2].tolist() == [(lane ^ width) + 100 for lane in range(64)]


def test_every_instruction_is_tested():
    tested = {name for name, _, _ in LOAD_TEXTS} | {name for name, _, _ in STORE_TEXTS}
    tested |= {text.split()[0] for text in HALVES}
    assert {*transfers.BUFFER, *transfers.GLOBAL, *transfers.LDS} == tested
