"""The Triton kernel: split → rmsnorm → mrope → cache-store, in one launch, on NVIDIA and AMD.

A program serves TOKENS tokens and HEADS heads of q, of k or of v. What the heads of a token share (weights, cosines,
sines) is loaded once, in the shape of the tile that a head is loaded in, [TOKENS, lanes], so that nothing moves between
threads but the sum of squares.

Arithmetic is float32. q and k are rounded once, to their own dtype; a cache of another dtype gets that value divided by
its scale and rounded again (to nearest, ties to even).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def qk_norm_rope_cache(
    q, k, v, q_weight, k_weight, cos, sin, positions, slots, blocks, k_scale, v_scale, k_cache, v_cache, q_out, k_out,
    num_tokens, seq_len, heads_per_program,
    q_batch_stride, q_token_stride, q_head_stride,
    k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    cos_batch_stride, cos_row_stride, cos_lane_stride,
    sin_batch_stride, sin_row_stride, sin_lane_stride,
    cos_table_rows, sin_table_rows, positions_axis_stride, positions_batch_stride, positions_token_stride,
    slots_batch_stride, slots_token_stride, blocks_batch_stride, blocks_token_stride,
    k_cache_offset, k_num_blocks, k_block_size,
    k_block_stride, k_slot_stride, k_cache_head_stride, k_lane_stride, k_slot_group_stride, k_lane_group_stride,
    v_cache_offset, v_num_blocks, v_block_size,
    v_block_stride, v_slot_stride, v_cache_head_stride, v_lane_stride, v_slot_group_stride, v_lane_group_stride,
    ONE_SEQUENCE: tl.constexpr, HEADS_ALIKE: tl.constexpr, ANGLES_ALIKE: tl.constexpr, NARROW: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    REST_WIDTH: tl.constexpr, IS_NEOX: tl.constexpr, Q_EPS: tl.constexpr, K_EPS: tl.constexpr,
    GEMMA_NORM: tl.constexpr, ANGLE_PER_LANE: tl.constexpr, NUM_AXES: tl.constexpr, AXES: tl.constexpr,
    SKIP_NEGATIVE_SLOTS: tl.constexpr, SATURATE: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    K_SLOT_GROUP: tl.constexpr, K_LANE_GROUP: tl.constexpr, V_SLOT_GROUP: tl.constexpr, V_LANE_GROUP: tl.constexpr,
    K_FLOAT8: tl.constexpr, V_FLOAT8: tl.constexpr, CONVERTS_FLOAT8: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, ALL_HEADS: tl.constexpr, WAITS_FOR_PREDECESSOR: tl.constexpr,
):  # fmt: skip
    if WAITS_FOR_PREDECESSOR:
        # Ahead of every access: another kernel may have made any of the tensors, weights and tables included, and may
        # still be reading what this one overwrites. To load weights earlier gains 0.1 µs at the most.
        gdc_wait()
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    # One sequence is told apart, since a division costs more than all of a program's other index arithmetic.
    batch, seq = (tl.zeros_like(token), token) if ONE_SEQUENCE else (token // seq_len, token % seq_len)
    # Offsets of 31 bits take half the instructions of 63. A cache may be larger than they reach.
    INDEX: tl.constexpr = tl.int32 if NARROW else tl.int64
    # A launch with a symbolic number of tokens decides by that number whether a program serves HEADS heads or one.
    heads = HEADS if ALL_HEADS else heads_per_program
    q_groups = tl.cdiv(NUM_HEADS, heads)
    kv_groups = tl.cdiv(NUM_KV_HEADS, heads)
    group = tl.program_id(1)
    is_q = group < q_groups
    is_v = group >= q_groups + kv_groups
    first_head = (group if is_q else group - q_groups - kv_groups if is_v else group - q_groups) * heads
    last_head = min(first_head + heads, NUM_HEADS if is_q else NUM_KV_HEADS)
    # Heads of one projection have one set of strides: nothing to choose.
    batch_stride, token_stride, head_stride = q_batch_stride, q_token_stride, q_head_stride
    if not HEADS_ALIKE:
        batch_stride = q_batch_stride if is_q else v_batch_stride if is_v else k_batch_stride
        token_stride = q_token_stride if is_q else v_token_stride if is_v else k_token_stride
        head_stride = q_head_stride if is_q else v_head_stride if is_v else k_head_stride
    rows = _token(batch, batch_stride, seq, token_stride, INDEX)
    # Code for HEADS heads, and where it may be one, for one: that their number is known keeps branches out of it.
    for count in tl.static_range(HEADS if ALL_HEADS else 1, HEADS + 1, max(HEADS - 1, 1)):
        if ALL_HEADS or heads == count:
            if not is_v:
                # q and k take one path: less code to fetch, which is half the time of a small launch.
                weight, eps = q_weight, Q_EPS
                if q_weight is not None:
                    weight = q_weight if is_q else k_weight
                if Q_EPS is not None:
                    eps = Q_EPS if is_q else K_EPS
                rotated = _rotated_heads(
                    tl.where(is_q, q, k), rows, live, first_head, last_head, head_stride, weight, eps,
                    cos, sin, positions, batch, seq,
                    cos_batch_stride, cos_row_stride, cos_lane_stride,
                    sin_batch_stride, sin_row_stride, sin_lane_stride,
                    cos_table_rows, sin_table_rows,
                    positions_axis_stride, positions_batch_stride, positions_token_stride,
                    count, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM, REST_WIDTH, IS_NEOX,
                    GEMMA_NORM, ANGLE_PER_LANE, NUM_AXES, AXES, ANGLES_ALIKE, INDEX,
                )  # fmt: skip
                if is_q:
                    _store_heads(
                        q_out + token.to(INDEX) * (NUM_HEADS * HEAD_DIM), live, first_head, last_head, HEAD_DIM,
                        rotated, 1, 0, 0, count, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM, REST_WIDTH, IS_NEOX,
                    )  # fmt: skip
                else:
                    # Loaded here: PyTorch takes a pointer that goes into a function which returns an address for
                    # written to.
                    slot_place = _token(batch, slots_batch_stride, seq, slots_token_stride, INDEX)
                    slot = tl.load(slots + slot_place, mask=live, other=0)
                    block = batch
                    if blocks is not None:
                        block_place = _token(batch, blocks_batch_stride, seq, blocks_token_stride, INDEX)
                        block = tl.load(blocks + block_place, mask=live, other=0)
                    place, stored = _cache_place(
                        slot, block, live, k_num_blocks, k_block_size, k_block_stride, k_slot_stride,
                        k_slot_group_stride, K_SLOT_GROUP, SKIP_NEGATIVE_SLOTS, blocks is not None,
                    )  # fmt: skip
                    if k_out is not None:
                        _store_heads(
                            k_out + token.to(INDEX) * (NUM_KV_HEADS * HEAD_DIM), live, first_head, last_head, HEAD_DIM,
                            rotated, 1, 0, 0, count, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM, REST_WIDTH, IS_NEOX,
                        )  # fmt: skip
                    keys = ()
                    for turn in tl.static_range(count):
                        parts = rotated[turn]
                        parts = _to_cache(
                            parts, k_scale, k_cache, K_SCALE, K_FLOAT8, SATURATE, CONVERTS_FLOAT8,
                            2 + _rests(HEAD_DIM, ROTARY_DIM, REST_WIDTH),
                        )  # fmt: skip
                        keys += (parts,)
                    _store_heads(
                        _bytes(k_cache, K_FLOAT8) + k_cache_offset + place, stored, first_head, last_head,
                        k_cache_head_stride, keys, k_lane_stride, k_lane_group_stride, K_LANE_GROUP,
                        count, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM, REST_WIDTH, IS_NEOX,
                    )  # fmt: skip
            else:
                values = ()
                for turn in tl.static_range(count):
                    here = _if_head(live, first_head + turn, last_head, count, NUM_HEADS, NUM_KV_HEADS)
                    head_rows = rows + (first_head + turn).to(INDEX) * head_stride
                    values += (_load_lanes(v, head_rows, here, 0, HEAD_DIM, 1),)
                # Loaded here for the same reason.
                slot_place = _token(batch, slots_batch_stride, seq, slots_token_stride, INDEX)
                slot = tl.load(slots + slot_place, mask=live, other=0)
                block = batch
                if blocks is not None:
                    block_place = _token(batch, blocks_batch_stride, seq, blocks_token_stride, INDEX)
                    block = tl.load(blocks + block_place, mask=live, other=0)
                place, stored = _cache_place(
                    slot, block, live, v_num_blocks, v_block_size, v_block_stride, v_slot_stride,
                    v_slot_group_stride, V_SLOT_GROUP, SKIP_NEGATIVE_SLOTS, blocks is not None,
                )  # fmt: skip
                # Where one tensor holds both caches, it is passed once.
                cache = k_cache if v_cache is None else v_cache
                v_rows = _bytes(cache, V_FLOAT8) + v_cache_offset + place
                values = _to_cache(values, v_scale, cache, V_SCALE, V_FLOAT8, SATURATE, CONVERTS_FLOAT8, count)
                for turn in tl.static_range(count):
                    _store_lanes(
                        v_rows + (first_head + turn).to(tl.int64) * v_cache_head_stride,
                        _if_head(stored, first_head + turn, last_head, count, NUM_HEADS, NUM_KV_HEADS),
                        values[turn], 0, HEAD_DIM, v_lane_stride, v_lane_group_stride, V_LANE_GROUP,
                    )  # fmt: skip


# --- the heads of a program ---------------------------------------------------------------------------------------


@triton.constexpr_function
def _none_left_over(count, num_heads, num_kv_heads):
    """Whether every program has `count` heads."""
    return num_heads % count == 0 and num_kv_heads % count == 0


@triton.jit
def _if_head(mask, head, last_head, COUNT: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """`mask`, or nothing beyond the last head of a program."""
    if not _none_left_over(COUNT, NUM_HEADS, NUM_KV_HEADS):
        mask = mask & (head < last_head)
    return mask


@triton.jit
def _rotated_heads(
    source, rows, live, first_head, last_head, head_stride, weight, eps, cos, sin, positions, batch, seq,
    cos_batch_stride, cos_row_stride, cos_lane_stride, sin_batch_stride, sin_row_stride, sin_lane_stride,
    cos_table_rows, sin_table_rows, positions_axis_stride, positions_batch_stride, positions_token_stride,
    COUNT: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, REST_WIDTH: tl.constexpr, IS_NEOX: tl.constexpr, GEMMA_NORM: tl.constexpr,
    ANGLE_PER_LANE: tl.constexpr, NUM_AXES: tl.constexpr, AXES: tl.constexpr, ANGLES_ALIKE: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """COUNT heads of q or of k, normalised and rotated.

    All are loaded before the first is used, so that they are in flight together, and rotated before any is stored:
    where none is left over that is one run of code, in which the sum of one head overlaps that of another.
    """
    heads = ()
    for turn in tl.static_range(COUNT):
        here = _if_head(live, first_head + turn, last_head, COUNT, NUM_HEADS, NUM_KV_HEADS)
        head_rows = rows + (first_head + turn).to(INDEX) * head_stride
        heads += (_load_head(source, head_rows, here, HEAD_DIM, ROTARY_DIM, REST_WIDTH, IS_NEOX),)
    factors, angles = _load_factors(
        weight, cos, sin, positions, batch, seq, live,
        cos_batch_stride, cos_row_stride, cos_lane_stride, sin_batch_stride, sin_row_stride, sin_lane_stride,
        cos_table_rows, sin_table_rows, positions_axis_stride, positions_batch_stride, positions_token_stride,
        HEAD_DIM, ROTARY_DIM, REST_WIDTH, IS_NEOX, GEMMA_NORM, ANGLE_PER_LANE, NUM_AXES, AXES, ANGLES_ALIKE, INDEX,
    )  # fmt: skip
    rotated = ()
    for turn in tl.static_range(COUNT):
        head = heads[turn]
        if _none_left_over(COUNT, NUM_HEADS, NUM_KV_HEADS) or first_head + turn < last_head:
            head = _norm_rope(head, factors, angles, eps, HEAD_DIM, ROTARY_DIM, REST_WIDTH)
        rotated += (head,)
    return rotated


@triton.jit
def _store_heads(
    rows, live, first_head, last_head, head_stride, heads, lane_stride, lane_group_stride, LANE_GROUP,
    COUNT: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, REST_WIDTH: tl.constexpr, IS_NEOX: tl.constexpr,
):  # fmt: skip
    """The counterpart of _rotated_heads."""
    for turn in tl.static_range(COUNT):
        _store_head(
            rows + (first_head + turn).to(tl.int64) * head_stride,
            _if_head(live, first_head + turn, last_head, COUNT, NUM_HEADS, NUM_KV_HEADS),
            heads[turn], lane_stride, lane_group_stride, LANE_GROUP, HEAD_DIM, ROTARY_DIM, REST_WIDTH, IS_NEOX,
        )  # fmt: skip


@triton.jit
def _token(batch, batch_stride, seq, seq_stride, INDEX: tl.constexpr):
    return batch.to(INDEX) * batch_stride + seq.to(INDEX) * seq_stride


# --- norm and rotation --------------------------------------------------------------------------------------------


@triton.jit
def _load_factors(
    weight, cos, sin, positions, batch, seq, live,
    cos_batch_stride, cos_row_stride, cos_lane_stride, sin_batch_stride, sin_row_stride, sin_lane_stride,
    cos_table_rows, sin_table_rows, positions_axis_stride, positions_batch_stride, positions_token_stride,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, REST_WIDTH: tl.constexpr, IS_NEOX: tl.constexpr,
    GEMMA_NORM: tl.constexpr, ANGLE_PER_LANE: tl.constexpr, NUM_AXES: tl.constexpr, AXES: tl.constexpr,
    ANGLES_ALIKE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What all heads of a token share: the norm's weights, and cosine and sine for either lane of a pair."""
    PARTS: tl.constexpr = 2 + _rests(HEAD_DIM, ROTARY_DIM, REST_WIDTH)
    factors = (1.0,) * PARTS
    if weight is not None:
        # The same for every token, but loaded in the shape of the tile: nothing moves between threads later.
        weights = _load_head(weight, tl.zeros_like(seq), live, HEAD_DIM, ROTARY_DIM, REST_WIDTH, IS_NEOX)
        factors = ()
        for part in tl.static_range(PARTS):
            factors += (_factor(weights[part], GEMMA_NORM),)
    if ANGLES_ALIKE:
        sin_batch_stride, sin_row_stride, sin_lane_stride = cos_batch_stride, cos_row_stride, cos_lane_stride
    if NUM_AXES == 0:
        cos_rows = _token(batch, cos_batch_stride, seq, cos_row_stride, INDEX)
        sin_rows = _token(batch, sin_batch_stride, seq, sin_row_stride, INDEX)
        cos_first, cos_second = _load_angles(cos, cos_rows, live, cos_lane_stride, ROTARY_DIM, IS_NEOX, ANGLE_PER_LANE)
        sin_first, sin_second = _load_angles(sin, sin_rows, live, sin_lane_stride, ROTARY_DIM, IS_NEOX, ANGLE_PER_LANE)
    else:
        # Whole rows of every axis, from which each pair takes its own: a gather would load lane by lane.
        place = _token(batch, positions_batch_stride, seq, positions_token_stride, INDEX)
        for axis in tl.static_range(NUM_AXES):
            position = tl.load(positions + (place + axis * positions_axis_stride), mask=live, other=0)
            cos_row, cos_inside = _table_row(position, live, cos_table_rows, INDEX)
            sin_row, sin_inside = cos_row, cos_inside
            if not ANGLES_ALIKE:
                sin_row, sin_inside = _table_row(position, live, sin_table_rows, INDEX)
            c_first, c_second = _load_angles(
                cos, cos_row * cos_row_stride, cos_inside, cos_lane_stride, ROTARY_DIM, IS_NEOX, ANGLE_PER_LANE
            )
            s_first, s_second = _load_angles(
                sin, sin_row * sin_row_stride, sin_inside, sin_lane_stride, ROTARY_DIM, IS_NEOX, ANGLE_PER_LANE
            )
            if axis == 0:
                cos_first, cos_second, sin_first, sin_second = c_first, c_second, s_first, s_second
            else:
                here = _pairs_of_axis(axis, AXES, ROTARY_DIM)[None, :]
                cos_first, cos_second = tl.where(here, c_first, cos_first), tl.where(here, c_second, cos_second)
                sin_first, sin_second = tl.where(here, s_first, sin_first), tl.where(here, s_second, sin_second)
    cos_first, cos_second = cos_first.to(tl.float32), cos_second.to(tl.float32)
    return factors, (cos_first, cos_second, sin_first.to(tl.float32), sin_second.to(tl.float32))


@triton.jit
def _norm_rope(head, factors, angles, eps, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, REST_WIDTH: tl.constexpr):
    """`head` normalised and rotated, in float32, and rounded to its dtype."""
    dtype: tl.constexpr = head[0].dtype
    RESTS: tl.constexpr = _rests(HEAD_DIM, ROTARY_DIM, REST_WIDTH)
    values = ()
    for part in tl.static_range(2 + RESTS):
        values += (head[part].to(tl.float32),)
    if eps is not None:
        squares = values[0] * values[0] + values[1] * values[1]
        if REST_WIDTH * 2 == ROTARY_DIM:
            for part in tl.static_range(2, 2 + RESTS):
                squares += values[part] * values[part]
        total = tl.sum(squares, 1)
        if REST_WIDTH * 2 != ROTARY_DIM:
            for part in tl.static_range(2, 2 + RESTS):
                total += tl.sum(values[part] * values[part], 1)
        scale = tl.rsqrt(total * (1.0 / HEAD_DIM) + eps)[:, None]
    normed = ()
    for part in tl.static_range(2 + RESTS):
        value = values[part]
        if eps is not None:
            value = value * scale
        normed += (value * factors[part],)
    first, second = normed[0], normed[1]
    rotated = ((first * angles[0] - second * angles[2]).to(dtype), (second * angles[1] + first * angles[3]).to(dtype))
    for part in tl.static_range(2, 2 + RESTS):
        rotated += (normed[part].to(dtype),)
    return rotated


@triton.jit
def _factor(weight, GEMMA_NORM: tl.constexpr):
    weight = weight.to(tl.float32)
    if GEMMA_NORM:
        weight += 1.0
    return weight


@triton.jit
def _table_row(position, live, table_rows, INDEX: tl.constexpr):
    """The row of a table, negative positions counting from its end, and whether there is such a row."""
    low = position.to(tl.int32)
    sign = low >> 31
    row = low + (sign & table_rows)
    # Without a sign, a row before the first is one beyond the last.
    inside = live & (row.to(tl.uint32) < table_rows)
    if position.dtype.primitive_bitwidth > 32:
        # 32 bits are enough for a row, and a position that needs more is outside.
        inside = inside & ((position >> 32).to(tl.int32) == sign)
    return row.to(INDEX), inside


@triton.jit
def _load_angles(
    base, rows, inside, lane_stride, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, ANGLE_PER_LANE: tl.constexpr
):
    """The angle's cosine or sine for the first and for the second lane of each pair.

    What is not inside is NaN: a position outside its table must not give a plausible number.
    """
    if ANGLE_PER_LANE:
        first, second = _load_pairs(base, rows, inside, lane_stride, ROTARY_DIM, IS_NEOX, float("nan"))
    else:
        first = _load_lanes(base, rows, inside, 0, ROTARY_DIM // 2, lane_stride, float("nan"))
        second = first
    return first, second


@triton.jit
def _pairs_of_axis(axis: tl.constexpr, AXES: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """Which pairs turn by the position on `axis`: one bit each of the number AXES."""
    PAIRS: tl.constexpr = triton.next_power_of_2(ROTARY_DIM // 2)
    WORDS: tl.constexpr = (PAIRS + 31) // 32
    pair = tl.arange(0, PAIRS)
    bits = tl.full([PAIRS], _word(AXES, (axis - 1) * WORDS), tl.int32)
    for word in tl.static_range(1, WORDS):
        bits = tl.where(pair < 32 * word, bits, _word(AXES, (axis - 1) * WORDS + word))
    return ((bits >> (pair % 32)) & 1) != 0


@triton.constexpr_function
def _word(number, index):
    """So many 32 bits of a number, as a signed integer."""
    bits = (number >> (32 * index)) & 0xFFFFFFFF
    return bits - ((bits & 0x80000000) << 1)


# --- the cache ----------------------------------------------------------------------------------------------------


@triton.jit
def _cache_place(
    slot, block, live, num_blocks, block_size, block_stride, slot_stride, slot_group_stride,
    SLOT_GROUP: tl.constexpr, SKIP_NEGATIVE_SLOTS: tl.constexpr, IN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Where each token goes, and whether it goes anywhere: never outside the cache."""
    slot, block = slot.to(tl.int64), block.to(tl.int64)
    if not SKIP_NEGATIVE_SLOTS:
        slot = tl.where(slot < 0, slot + block_size, slot)
    block = tl.where(block < 0, block + num_blocks, block) if IN_BLOCKS else block % num_blocks
    stored = live & (slot >= 0) & (slot < block_size) & (block >= 0) & (block < num_blocks)
    place = block * block_stride
    if SLOT_GROUP > 0:
        place += slot // SLOT_GROUP * slot_group_stride + slot % SLOT_GROUP * slot_stride
    else:
        place += slot * slot_stride
    return place, stored


@triton.jit
def _to_cache(
    parts, scale_pointer, cache, SCALE: tl.constexpr, FLOAT8: tl.constexpr, SATURATE: tl.constexpr,
    CONVERTS_FLOAT8: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Parts of a head, or heads, as the cache holds them; float8 as bytes."""
    stored = ()
    for part in tl.static_range(PARTS):
        value = parts[part]
        if scale_pointer is not None:
            value = tl.div_rn(value.to(tl.float32), tl.load(scale_pointer).to(tl.float32))
        elif SCALE is not None:
            value = tl.div_rn(value.to(tl.float32), SCALE)
        if FLOAT8 is None:
            value = value.to(cache.dtype.element_ty)
        elif CONVERTS_FLOAT8:
            value = _converted_float8(value.to(tl.float32), FLOAT8, SATURATE)
        else:
            value = _float8(value.to(tl.float32), FLOAT8, SATURATE)
        stored += (value,)
    return stored


@triton.jit
def _bytes(pointers, FLOAT8: tl.constexpr):
    if FLOAT8 is not None:
        pointers = pointers.to(tl.pointer_type(tl.uint8), bitcast=True)
    return pointers


@triton.jit
def _float8(value, FORMAT: tl.constexpr, SATURATE: tl.constexpr):
    """float32 to the byte of a float8, to nearest, ties to even; see ``to_cache`` of the reference.

    In integers, so that the result does not depend on a GPU's converters: AMD's may saturate.
    """
    MANTISSA: tl.constexpr = 2 if FORMAT == "e5m2" else 3
    BIAS: tl.constexpr = 15 if FORMAT == "e5m2" else 7 if FORMAT == "e4m3fn" else 8
    LARGEST: tl.constexpr = 0x7B if FORMAT == "e5m2" else 0x7E if FORMAT == "e4m3fn" else 0x7F
    OVERFLOW: tl.constexpr = 0x7C if FORMAT == "e5m2" else 0x7F if FORMAT == "e4m3fn" else 0x80
    NAN: tl.constexpr = 0x80 if FORMAT == "e4m3fnuz" else 0x7F
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)
    normal = (rounded >> SHIFT).to(tl.int32) - ((127 - BIAS) << MANTISSA)
    # Adding a number whose last place is the smallest subnormal rounds to a multiple of it.
    MAGIC: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    subnormal = (magnitude.to(tl.float32, bitcast=True) + MAGIC).to(tl.int32, bitcast=True) - (
        (127 + 24 - BIAS - MANTISSA) << 23
    )
    byte = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)
    byte = tl.where(byte > LARGEST, LARGEST if SATURATE else OVERFLOW, byte)
    sign = (bits >> 24).to(tl.int32) & 0x80
    if FORMAT == "e4m3fnuz":
        sign = tl.where(byte == 0, 0, sign)
    byte = tl.where(magnitude > 0x7F800000, NAN, byte) | sign
    return byte.to(tl.uint8)


@triton.jit
def _converted_float8(value, FORMAT: tl.constexpr, SATURATE: tl.constexpr):
    """The same by NVIDIA's converter, which rounds alike and saturates; what is beyond the range is told apart here."""
    BEYOND: tl.constexpr = 0x43E80000 if FORMAT == "e4m3fn" else 0x476FFFFF  # 464 and just below 61440, in float32
    OVERFLOW: tl.constexpr = 0x7F if FORMAT == "e4m3fn" else 0x7C
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = ((bits >> 24) & 0x80).to(tl.uint8)
    if FORMAT == "e4m3fn":
        byte = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        byte = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
    if not SATURATE:
        byte = tl.where(magnitude > BEYOND, sign | OVERFLOW, byte)
    return tl.where(magnitude > 0x7F800000, sign | 0x7F, byte)


# --- lanes --------------------------------------------------------------------------------------------------------


@triton.jit
def _lane_mask(live, COUNT: tl.constexpr):
    """Whole rows where a power of two of lanes leaves none over: a mask on lanes costs instructions."""
    mask = live[:, None]
    if triton.next_power_of_2(COUNT) != COUNT:
        mask = mask & (tl.arange(0, triton.next_power_of_2(COUNT)) < COUNT)[None, :]
    return mask


@triton.jit
def _load_lanes(base, rows, live, START: tl.constexpr, COUNT: tl.constexpr, stride, OTHER: tl.constexpr = None):
    """Lanes START … START + COUNT of each row, [rows, next power of two], 0 beyond; rows are offsets from `base`.

    Rows that are not live are OTHER, or undefined.
    """
    lane = tl.arange(0, triton.next_power_of_2(COUNT))
    pointers = base + (rows[:, None] + (lane * stride)[None, :]) + START * stride
    if OTHER is not None:
        lanes = tl.load(pointers, mask=_lane_mask(live, COUNT), other=OTHER)
    elif triton.next_power_of_2(COUNT) != COUNT:
        lanes = tl.load(pointers, mask=_lane_mask(live, COUNT), other=0.0)
    else:
        lanes = tl.load(pointers, mask=_lane_mask(live, COUNT))
    return lanes


@triton.constexpr_function
def _rests(head_dim, rotary_dim, rest_width):
    """In how many parts the lanes that do not rotate are loaded."""
    return (head_dim - rotary_dim) // rest_width if rest_width else 0


@triton.jit
def _load_head(
    base, rows, live, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, REST_WIDTH: tl.constexpr, IS_NEOX: tl.constexpr
):
    """One head in every row: the two lanes of each pair, and the lanes that do not rotate, REST_WIDTH at a time.

    Parts of one width are laid out alike, and need no exchange between threads where they are added.
    """
    first, second = _load_pairs(base, rows, live, 1, ROTARY_DIM, IS_NEOX)
    head = (first, second)
    for part in tl.static_range(_rests(HEAD_DIM, ROTARY_DIM, REST_WIDTH)):
        head += (_load_lanes(base, rows, live, ROTARY_DIM + part * REST_WIDTH, REST_WIDTH, 1),)
    return head


@triton.jit
def _load_pairs(base, rows, live, stride, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, OTHER: tl.constexpr = None):
    """The first and the second lane of each pair: half a rotation apart (neox), or neighbours (GPT-J)."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    if IS_NEOX:
        first = _load_lanes(base, rows, live, 0, HALF, stride, OTHER)
        second = _load_lanes(base, rows, live, HALF, HALF, stride, OTHER)
    else:
        both = _load_lanes(base, rows, live, 0, ROTARY_DIM, stride, OTHER)
        first, second = tl.split(tl.reshape(both, [both.shape[0], both.shape[1] // 2, 2]))
    return first, second


@triton.jit
def _store_lanes(
    rows, live, value, START: tl.constexpr, COUNT: tl.constexpr, stride, group_stride, GROUP: tl.constexpr
):
    """The counterpart of _load_lanes, with pointers to rows.

    Lanes of a cache may lie in groups, as in aiter's shuffle layout.
    """
    lane = START + tl.arange(0, triton.next_power_of_2(COUNT))
    if GROUP > 0:
        offset = lane // GROUP * group_stride + lane % GROUP * stride
    else:
        offset = lane * stride
    tl.store(rows[:, None] + offset[None, :], value, mask=_lane_mask(live, COUNT))


@triton.jit
def _store_head(
    rows, live, head, stride, group_stride, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, REST_WIDTH: tl.constexpr, IS_NEOX: tl.constexpr,
):  # fmt: skip
    """The counterpart of _load_head."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    if IS_NEOX:
        _store_lanes(rows, live, head[0], 0, HALF, stride, group_stride, GROUP)
        _store_lanes(rows, live, head[1], HALF, HALF, stride, group_stride, GROUP)
    else:
        _store_lanes(rows, live, tl.interleave(head[0], head[1]), 0, ROTARY_DIM, stride, group_stride, GROUP)
    for part in tl.static_range(_rests(HEAD_DIM, ROTARY_DIM, REST_WIDTH)):
        _store_lanes(
            rows, live, head[2 + part], ROTARY_DIM + part * REST_WIDTH, REST_WIDTH, stride, group_stride, GROUP
        )
