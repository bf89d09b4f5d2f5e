"""The projection of q, k and v with norm, rotation and store as its epilogue: two kernels for few tokens.

Both compute W xᵀ, a head by all tokens: the weights, which are what there is to read, go from shared memory into the
matrix unit.

``plain`` is what Triton's own language gives: tensor descriptors, a pipelined loop, split K, and the last program to
arrive reduces and runs the epilogue. ``ring`` is written in Gluon, Triton's lower level, for Hopper: weights and input
come through a ring of buffers, which holds as much of them as shared memory does; the weights may be asked for ahead of
the wait for the kernel that writes the input; two programs of a head may each finish half of the tokens.

Here lanes rotate by halves, all of them, by one position; head_dim is 128; a row of the table is cosines, then sines.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# --- in Triton ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("tokens", "blocks", "num_heads", "num_kv_heads"))
def plain(
    w_rows, x_rows, q_weight, k_weight, table, positions, slots, q_out, k_cache, v_cache, partials, arrived,
    tokens, blocks, num_heads, num_kv_heads, eps,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A head by all tokens a tile, of `blocks` blocks along K, which SPLIT programs share."""
    tile, part = tl.program_id(0), tl.program_id(1)
    if WAIT:
        gdc_wait()
    first = tl.zeros([64, TOKENS], tl.float32)
    second = tl.zeros([64, TOKENS], tl.float32)
    for block in tl.range(part * blocks // SPLIT, (part + 1) * blocks // SPLIT, num_stages=STAGES):
        x = x_rows.load([0, block * BLOCK]).T
        first = tl.dot(w_rows.load([tile * 128, block * BLOCK]), x, first)
        second = tl.dot(w_rows.load([tile * 128 + 64, block * BLOCK]), x, second)
    lane, token = tl.arange(0, 64)[:, None], tl.arange(0, TOKENS)[None, :]
    live = token < tokens
    mine = True
    if SPLIT > 1:
        place = partials + tile * SPLIT * TOKENS * 128 + token * 128 + lane
        tl.store(place + part * TOKENS * 128, first, mask=live)
        tl.store(place + part * TOKENS * 128 + 64, second, mask=live)
        tl.debug_barrier()
        # Never reset: 64 bits do not overflow, and every launch adds as many.
        mine = tl.atomic_add(arrived + tile, 1, sem="acq_rel") % SPLIT == SPLIT - 1
        if mine:
            first, second = tl.zeros_like(first), tl.zeros_like(second)
            for turn in tl.static_range(SPLIT):
                first += tl.load(place + turn * TOKENS * 128, mask=live, other=0, cache_modifier=".cg")
                second += tl.load(place + turn * TOKENS * 128 + 64, mask=live, other=0, cache_modifier=".cg")
    if mine:
        is_q, is_v = tile < num_heads, tile >= num_heads + num_kv_heads
        if not is_v:
            weight = tl.where(is_q, q_weight, k_weight)
            scale = tl.rsqrt(tl.sum(first * first + second * second, 0) * (1 / 128) + eps)[None, :]
            first *= scale * tl.load(weight + lane).to(tl.float32)
            second *= scale * tl.load(weight + lane + 64).to(tl.float32)
            row = tl.load(positions + token, mask=live, other=0) * 128
            cos = tl.load(table + row + lane, mask=live, other=0).to(tl.float32)
            sin = tl.load(table + row + lane + 64, mask=live, other=0).to(tl.float32)
            first, second = first * cos - second * sin, second * cos + first * sin
        if is_q:
            out = q_out + (token * num_heads + tile) * 128 + lane
        else:
            slot = tl.load(slots + token, mask=live, other=0)
            head = tile - num_heads - (num_kv_heads if is_v else 0)
            out = tl.where(is_v, v_cache, k_cache) + (slot * num_kv_heads + head) * 128 + lane
        tl.store(out, first.to(tl.bfloat16), mask=live)
        tl.store(out + 64, second.to(tl.bfloat16), mask=live)


# --- in Gluon -----------------------------------------------------------------------------------------------------


@gluon.jit
def _ask_for_weights(
    w_rows, ready, w_ring, turn, tile, start, count, shift, inside, TURNS: gl.constexpr, TOKENS: gl.constexpr
):
    """Begin to load the weights of a program's `turn`-th block, where it has that many."""
    STAGES: gl.constexpr = w_ring.shape[0]
    ROWS: gl.constexpr = w_ring.shape[1]
    BLOCK: gl.constexpr = w_ring.shape[2]
    stage, inside = turn % STAGES, inside & (turn < count * TURNS)
    row, block = tile * 128, (turn + shift) % count
    if TURNS == 2:
        row += turn // count * 64
    mbarrier.expect(ready.index(stage), (ROWS + TOKENS) * BLOCK * 2, pred=inside)
    place = [row, (start + block) * BLOCK]
    tma.async_copy_global_to_shared(w_rows, place, ready.index(stage), w_ring.index(stage), pred=inside)


@gluon.jit
def _ask_for_input(x_rows, ready, x_ring, turn, start, count, shift, inside, TURNS: gl.constexpr):
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK: gl.constexpr = x_ring.shape[2]
    stage, inside = turn % STAGES, inside & (turn < count * TURNS)
    place = [0, (start + (turn + shift) % count) * BLOCK]
    tma.async_copy_global_to_shared(x_rows, place, ready.index(stage), x_ring.index(stage), pred=inside)


@gluon.jit
def _multiply(
    acc, w_rows, x_rows, ready, w_ring, x_ring, turn, tile, start, count, shift, TURNS: gl.constexpr,
    TOKENS: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """Add a program's `turn`-th block, and ask for the one that takes its place in the ring, or with LAG that of the
    block before.
    """
    STAGES: gl.constexpr = w_ring.shape[0]
    stage = turn % STAGES
    mbarrier.wait(ready.index(stage), turn // STAGES & 1)
    acc = warpgroup_mma(w_ring.index(stage), x_ring.index(stage).permute((1, 0)), acc, is_async=LAG)
    if LAG:
        acc = warpgroup_mma_wait(1, deps=(acc,))
    # No warp may still read what is overwritten.
    gl.thread_barrier()
    then = turn + STAGES - (1 if LAG else 0)
    _ask_for_weights(w_rows, ready, w_ring, then, tile, start, count, shift, then >= STAGES, TURNS, TOKENS)
    _ask_for_input(x_rows, ready, x_ring, then, start, count, shift, then >= STAGES, TURNS)
    return acc


@gluon.jit
def _load_tokens(positions, slots, token, tokens):
    live = token < tokens
    row = gl.load(positions + token, mask=live, other=0).to(gl.int32) * 128
    return row, gl.load(slots + token, mask=live, other=0)


@gluon.jit
def _load_angles(table, row, lane, live):
    angles = table + row[None, :] + lane[:, None]
    return gl.load(angles, mask=live[None, :], other=0), gl.load(angles + 64, mask=live[None, :], other=0)


@gluon.jit
def _finish_head(
    first, second, head, cos, sin, first_weight, second_weight, slot, token, lane, live,
    q_out, k_cache, v_cache, num_heads, num_kv_heads, eps, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """Norm, rotation and store of one head; without EPILOGUE the store alone, as a projection does it."""
    is_q, is_v = head < num_heads, head >= num_heads + num_kv_heads
    if EPILOGUE:
        if is_q:
            out = q_out + token[None, :] * (num_heads * 128) + head * 128
        else:
            cache = v_cache if is_v else k_cache
            kv_head = head - num_heads - (num_kv_heads if is_v else 0)
            out = cache + slot[None, :] * (num_kv_heads * 128) + kv_head * 128
        if not is_v:
            scale = gl.rsqrt(gl.sum(first * first + second * second, 0) * (1 / 128) + eps)[None, :]
            a, b = first * scale * first_weight, second * scale * second_weight
            first, second = a * cos - b * sin, b * cos + a * sin
    else:
        out = q_out + token[None, :] * ((num_heads + 2 * num_kv_heads) * 128) + head * 128
    gl.store(out + lane[:, None], first.to(gl.bfloat16), mask=live[None, :])
    gl.store(out + lane[:, None] + 64, second.to(gl.bfloat16), mask=live[None, :])


@gluon.jit
def _pairs(acc, rest, TURNS: gl.constexpr, BY_TOKEN: gl.constexpr):
    """The lanes that rotate with each other, each [64, tokens]: with four warps they lie in one thread."""
    if TURNS == 2:
        first, second = acc, rest
    else:
        first, second = gl.split(gl.permute(gl.reshape(acc, (2, 64, acc.shape[1])), (1, 2, 0)))
    return gl.convert_layout(first, BY_TOKEN), gl.convert_layout(second, BY_TOKEN)


@gluon.jit
def _mine_and_yours(acc, part):
    """Half of the tokens, and the other half."""
    HALF: gl.constexpr = acc.shape[1] // 2
    early, late = gl.split(gl.permute(gl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
    return gl.where(part == 0, early, late), gl.where(part == 0, late, early)


@gluon.jit
def _store_share(place, acc, live_tokens):
    MATRIX: gl.constexpr = acc.type.layout
    rows = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, MATRIX))[:, None]
    columns = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, MATRIX))[None, :]
    gl.store(place + columns * 128 + rows, acc, mask=columns < live_tokens)


@gluon.jit
def _load_share(place, lane, column, live):
    share = place + column[None, :] * 128 + lane[:, None]
    first = gl.load(share, mask=live[None, :], other=0, cache_modifier=".cg")
    return first, gl.load(share + 64, mask=live[None, :], other=0, cache_modifier=".cg")


@gluon.jit
def _finish(
    acc, rest, tile, part, row, slot, q_weight, k_weight, table, q_out, k_cache, v_cache, partials, arrived,
    tokens, num_heads, num_kv_heads, eps,
    TOKENS: gl.constexpr, TURNS: gl.constexpr, SPLIT: gl.constexpr, SPREAD: gl.constexpr, EPILOGUE: gl.constexpr,
    BY_TOKEN: gl.constexpr,
):  # fmt: skip
    """Add up the shares of a tile and finish it: the last program to arrive, in one order, or with SPREAD each of two
    programs for half of the tokens. `row` and `slot` are those of the program's tokens.
    """
    HALF: gl.constexpr = TOKENS // 2
    MINE: gl.constexpr = HALF if SPREAD else TOKENS
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, BY_TOKEN))
    column = gl.arange(0, MINE, layout=gl.SliceLayout(0, BY_TOKEN))
    token = column + (part * HALF if SPREAD else 0)
    live = token < tokens
    weight = q_weight if tile < num_heads else k_weight
    first_weight = gl.load(weight + lane).to(gl.float32)[:, None]
    second_weight = gl.load(weight + lane + 64).to(gl.float32)[:, None]
    # Asked for ahead of the exchange, which takes longer.
    cos, sin = _load_angles(table, row, lane, live)
    last = True
    if SPREAD:
        gl.static_assert(SPLIT == 2)
        shares = partials + tile * 2 * HALF * 128
        given = tokens - (1 - part) * HALF
        acc, yours = _mine_and_yours(acc, part)
        _store_share(shares + part * HALF * 128, yours, given)
        if TURNS == 2:
            rest, yours = _mine_and_yours(rest, part)
            _store_share(shares + part * HALF * 128 + 64, yours, given)
        gl.thread_barrier()
        # Never reset: 64 bits do not overflow, and every launch adds as many.
        ticket = gl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
        first, second = _pairs(acc, rest, TURNS, BY_TOKEN)
        both = ticket // 2 * 2 + 2
        ticket += 1
        while ticket < both:
            ticket = gl.atomic_add(arrived + tile, 0, sem="acq_rel", scope="gpu")
        more, yet_more = _load_share(shares + (1 - part) * HALF * 128, lane, column, live)
        # Of two numbers the order does not matter.
        first, second = first + more, second + yet_more
    elif SPLIT > 1:
        shares = partials + tile * SPLIT * TOKENS * 128
        _store_share(shares + part * TOKENS * 128, acc, tokens)
        if TURNS == 2:
            _store_share(shares + part * TOKENS * 128 + 64, rest, tokens)
        gl.thread_barrier()
        last = gl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") % SPLIT == SPLIT - 1
        first = gl.zeros([64, TOKENS], gl.float32, layout=BY_TOKEN)
        second = gl.zeros([64, TOKENS], gl.float32, layout=BY_TOKEN)
        for other in gl.static_range(SPLIT):
            more, yet_more = _load_share(shares + other * TOKENS * 128, lane, column, live & last)
            first, second = first + more, second + yet_more
    else:
        first, second = _pairs(acc, rest, TURNS, BY_TOKEN)
    if last:
        _finish_head(
            first, second, tile, cos.to(gl.float32), sin.to(gl.float32), first_weight, second_weight,
            slot, token, lane, live, q_out, k_cache, v_cache, num_heads, num_kv_heads, eps, EPILOGUE,
        )  # fmt: skip


@gluon.jit(do_not_specialize=("tokens", "blocks", "num_heads", "num_kv_heads"))
def ring(
    w_rows, x_rows, q_weight, k_weight, table, positions, slots, q_out, k_cache, v_cache, partials, arrived,
    tokens, blocks, num_heads, num_kv_heads, eps,
    TOKENS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    SPLIT: gl.constexpr, SPREAD: gl.constexpr, SHIFT: gl.constexpr, LAG: gl.constexpr,
    WAIT: gl.constexpr, AHEAD: gl.constexpr, TRIGGER: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """A tile is a head by all tokens, of `blocks` blocks along K, which SPLIT programs share.

    With TURNS = 2 a program takes one half of the head after the other, so that a block may be twice as long.
    """
    ROWS: gl.constexpr = 128 // TURNS
    MATRIX: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, TOKENS, 16])
    # Eight lanes a thread, the lanes of a head in one warp: whole 16-byte accesses, and sums that stay in a warp.
    BY_TOKEN: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    tile, part = gl.program_id(0) // SPLIT, gl.program_id(0) % SPLIT
    start = part * blocks // SPLIT
    count = (part + 1) * blocks // SPLIT - start
    # Tiles begin at different columns, so that they do not all read the same rows of the input at once.
    shift = tile * SHIFT % count
    w_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, BLOCK], w_rows.layout)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, BLOCK], x_rows.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    # No kernel of a step writes weights: they alone may be asked for before the kernel that writes the input is done.
    if WAIT and not AHEAD:
        gdc_wait()
    for i in gl.static_range(STAGES):
        _ask_for_weights(w_rows, ready, w_ring, i, tile, start, count, shift, True, TURNS, TOKENS)
    if WAIT and AHEAD:
        gdc_wait()
    for i in gl.static_range(STAGES):
        _ask_for_input(x_rows, ready, x_ring, i, start, count, shift, True, TURNS)
    if TRIGGER:
        gdc_launch_dependents()
    MINE: gl.constexpr = TOKENS // 2 if SPREAD else TOKENS
    token = (part * MINE if SPREAD else 0) + gl.arange(0, MINE, layout=gl.SliceLayout(0, BY_TOKEN))
    row, slot = _load_tokens(positions, slots, token, tokens)
    acc = gl.zeros([ROWS, TOKENS], gl.float32, layout=MATRIX)
    rest = gl.zeros([ROWS, TOKENS], gl.float32, layout=MATRIX)
    for turn in range(0, count):
        acc = _multiply(acc, w_rows, x_rows, ready, w_ring, x_ring, turn, tile, start, count, shift, TURNS, TOKENS, LAG)
    if TURNS == 2:
        if LAG:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        for turn in range(count, count * 2):
            rest = _multiply(
                rest, w_rows, x_rows, ready, w_ring, x_ring, turn, tile, start, count, shift, TURNS, TOKENS, LAG
            )
    if LAG:
        if TURNS == 2:
            rest = warpgroup_mma_wait(0, deps=(rest,))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
    _finish(
        acc, rest, tile, part, row, slot, q_weight, k_weight, table, q_out, k_cache, v_cache, partials, arrived,
        tokens, num_heads, num_kv_heads, eps, TOKENS, TURNS, SPLIT, SPREAD, EPILOGUE, BY_TOKEN,
    )  # fmt: skip
