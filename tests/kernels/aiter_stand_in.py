"""A stand-in for AMD's aiter, on the CPU and as strict as the contract that our adapter was written from.

It reads and writes memory by address, as the real one does: what has another dtype than expected is garbage, not an
error. What would end the process raises :class:`Abort`.
"""

from __future__ import annotations

import math

import torch


class Abort(RuntimeError):
    """The real one would end the process, or write where it must not."""


def raw(tensor, dtype):
    """Everything from the tensor's first element to the end of its storage, reinterpreted."""
    everything = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size()
    usable = (everything.numel() - start) // dtype.itemsize * dtype.itemsize
    return everything[start : start + usable].view(dtype)


def read(tensor, dtype, index):
    """Elements at `index` from the tensor's address on; beyond its storage lies something else."""
    memory = raw(tensor, dtype)
    inside = (index >= 0) & (index < memory.numel())
    garbage = torch.full_like(index, 0x5A).to(dtype)
    return torch.where(inside, memory[index.clamp(0, memory.numel() - 1)], garbage)


def write(tensor, dtype, index, value):
    memory = raw(tensor, dtype)
    if bool(((index < 0) | (index >= memory.numel())).any()):
        raise Abort("written outside of the cache")
    as_integers(memory)[index] = as_integers(value)


def as_integers(tensor):
    """A float8 as bytes: PyTorch indexes some of the formats nowhere."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def integers(**values):
    """As pybind11 converts them: nothing is an integer but an integer."""
    for name, value in values.items():
        if type(value) is not int:
            raise TypeError(f"incompatible function arguments: {name}={value!r}")


def flags(**values):
    for name, value in values.items():
        if type(value) is not bool:
            raise TypeError(f"incompatible function arguments: {name}={value!r}")


def contiguous(**tensors):
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise Abort(f"{name} must be contiguous")


class Aiter:
    """The module. Each step is a method of its own, so that a variant can be wrong in one of them.

    Args:
        reads_strides: as since aiter #4531; before, caches were taken for contiguous.
        saturates: what becomes of numbers that no float8 holds; the contract does not say.
    """

    def __init__(self, reads_strides=True, saturates=False):
        self.reads_strides = reads_strides
        self.saturates = saturates
        self.calls = 0

    def fused_qk_norm_mrope_3d_cache_pts_quant_shuffle(
        self, qkv, qw, kw, cos_sin, positions, num_tokens, num_heads_q, num_heads_k, num_heads_v, head_size,
        is_neox_style, mrope_section_, is_interleaved, eps, q_out, k_cache, v_cache, slot_mapping, per_tensor_k_scale,
        per_tensor_v_scale, k_out, v_out, return_kv, use_shuffle_layout, block_size, x, rotary_dim=0, gemma_norm=False,
        /,
    ):  # fmt: skip
        flags(is_interleaved=is_interleaved, gemma_norm=gemma_norm)
        if positions.dim() != 2:
            raise Abort("positions must be 2D")
        if len(mrope_section_) != 3 or sum(mrope_section_) != (rotary_dim or head_size) // 2:
            raise Abort("mrope_section must be three numbers that sum to rotary_dim / 2")
        axes = self.axes(mrope_section_, is_interleaved)
        self.run(
            qkv, qw, kw, cos_sin, positions, num_tokens, num_heads_q, num_heads_k, num_heads_v, head_size,
            is_neox_style, axes, eps, q_out, k_cache, v_cache, slot_mapping, per_tensor_k_scale, per_tensor_v_scale,
            k_out, v_out, return_kv, use_shuffle_layout, block_size, x, rotary_dim, gemma_norm,
        )  # fmt: skip

    def fused_qk_norm_rope_cache_pts_quant_shuffle(
        self, qkv, qw, kw, cos_sin, positions, num_tokens, num_heads_q, num_heads_k, num_heads_v, head_size,
        is_neox_style, eps, q_out, k_cache, v_cache, slot_mapping, per_tensor_k_scale, per_tensor_v_scale, k_out,
        v_out, return_kv, use_shuffle_layout, block_size, x, rotary_dim=0, /,
    ):  # fmt: skip
        if positions.dim() != 1:
            raise Abort("positions must be 1D")
        contiguous(positions=positions)
        axes = [0] * ((rotary_dim or head_size) // 2)
        self.run(
            qkv, qw, kw, cos_sin, positions[None], num_tokens, num_heads_q, num_heads_k, num_heads_v, head_size,
            is_neox_style, axes, eps, q_out, k_cache, v_cache, slot_mapping, per_tensor_k_scale, per_tensor_v_scale,
            k_out, v_out, return_kv, use_shuffle_layout, block_size, x, rotary_dim, False,
        )  # fmt: skip

    def run(
        self, qkv, qw, kw, cos_sin, positions, num_tokens, num_heads_q, num_heads_k, num_heads_v, head_size, is_neox,
        axes, eps, q_out, k_cache, v_cache, slot_mapping, k_scale, v_scale, k_out, v_out, return_kv, shuffle,
        block_size, x, rotary_dim, gemma,
    ):  # fmt: skip
        self.calls += 1
        integers(
            num_tokens=num_tokens, num_heads_q=num_heads_q, num_heads_k=num_heads_k, num_heads_v=num_heads_v,
            head_size=head_size, block_size=block_size, x=x, rotary_dim=rotary_dim,
        )  # fmt: skip
        flags(is_neox_style=is_neox, return_kv=return_kv, use_shuffle_layout=shuffle)
        contiguous(qkv=qkv, qw=qw, kw=kw, cos_sin=cos_sin, slot_mapping=slot_mapping)
        dtype, cache_dtype = qkv.dtype, k_cache.dtype
        if dtype not in (torch.bfloat16, torch.float16) or head_size not in (64, 128, 256):
            raise Abort(f"{dtype}, head_size {head_size}")
        if cache_dtype not in (dtype, torch.float8_e4m3fn, torch.float8_e4m3fnuz):
            raise Abort(f"Unsupported KV cache dtype: {cache_dtype}")
        if block_size & (block_size - 1) or x & (x - 1):
            raise Abort(f"block_size {block_size}, x {x}")
        if not shuffle and (k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1):
            raise Abort("caches must have a unit last stride")
        rotary_dim = self.rotary_dim(rotary_dim, head_size)

        heads = num_heads_q + num_heads_k + num_heads_v
        data = read(qkv, dtype, torch.arange(num_tokens * heads * head_size)).view(num_tokens, heads, head_size)
        q, k, v = data.split([num_heads_q, num_heads_k, num_heads_v], 1)
        q_weight, k_weight = (read(w, dtype, torch.arange(head_size)) for w in (qw, kw))
        cos, sin = self.angles(cos_sin, dtype, positions, num_tokens, axes, rotary_dim)
        q, k = self.norm(q, q_weight, eps, gemma), self.norm(k, k_weight, eps, gemma)
        k_unturned = k
        q, k = (self.rotate(t, cos, sin, rotary_dim, is_neox) for t in (q, k))
        raw(q_out, dtype)[: q.numel()] = self.finish(q).flatten()

        slots = read(slot_mapping, torch.int64, torch.arange(num_tokens))
        kept = slots >= 0
        scales = [self.host_float(scale) for scale in (k_scale, v_scale)]
        k_stored, v_stored = self.stored(k, k_unturned, v)
        for name, value, cache, scale, out in (
            ("k", k_stored, k_cache, scales[0], k_out), ("v", v_stored, v_cache, scales[1], v_out),
        ):  # fmt: skip
            if value is None:
                continue
            if cache_dtype != dtype:
                value = self.convert(value, scale, cache_dtype)
            place = self.places(name, cache, slots[kept], value.shape[1], head_size, shuffle, block_size, x)
            write(cache, cache_dtype, place, as_integers(value)[kept].view(cache_dtype))
            if return_kv and out is not None:
                rows = raw(out, cache_dtype)[: value.numel()].view(value.shape)
                as_integers(rows)[kept] = as_integers(value)[kept]

    def axes(self, section, interleaved):
        if interleaved:
            return [i % 3 if i % 3 and i < 3 * section[i % 3] else 0 for i in range(sum(section))]
        return [axis for axis in range(3) for _ in range(section[axis])]

    def rotary_dim(self, rotary_dim, head_size):
        return rotary_dim or head_size

    def host_float(self, scale):
        """``*(float*)data_ptr()``"""
        if scale.device.type != "cpu":
            raise Abort("an address on the device, dereferenced on the host")
        return float(raw(scale, torch.float32)[0])

    def positions(self, positions, num_tokens):
        """[3, T], by its strides, whatever it holds."""
        axis_stride, token_stride = positions.stride()
        index = torch.arange(positions.shape[0])[:, None] * axis_stride + torch.arange(num_tokens) * token_stride
        return read(positions, torch.int64, index)

    def angles(self, cos_sin, dtype, positions, num_tokens, axes, rotary_dim):
        rows = self.positions(positions, num_tokens)[axes].T
        pair = torch.arange(rotary_dim // 2)
        cos, sin = (read(cos_sin, dtype, rows * rotary_dim + half * (rotary_dim // 2) + pair) for half in (0, 1))
        return cos[:, None].float(), sin[:, None].float()

    def norm(self, x, weight, eps, gemma):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return (y * (weight.float() + gemma)).to(x.dtype)

    def rotate(self, x, cos, sin, rotary_dim, is_neox):
        turned, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
        if is_neox:
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned.to(x.dtype), rest], -1)

    def finish(self, q):
        return q

    def stored(self, k, k_unturned, v):
        """What goes to the caches."""
        return k, v

    def convert(self, value, scale, dtype):
        value = value.float() / scale
        if dtype.itemsize > 1:
            return value.to(dtype)
        largest = torch.finfo(dtype).max
        # Beyond by half a step or more; PyTorch's own conversion saturates in some versions.
        beyond = value.abs() > largest + 2 ** math.floor(math.log2(largest)) * torch.finfo(dtype).eps / 2
        value = value.clamp(-largest, largest)
        return (value if self.saturates else value.masked_fill(beyond, torch.nan)).to(dtype)

    def places(self, name, cache, slots, num_heads, head_size, shuffle, block_size, x):
        """[T, H, D], in elements from the cache's address on."""
        slots, head, lane = slots[:, None, None], torch.arange(num_heads)[:, None], torch.arange(head_size)
        if shuffle:
            block, slot = slots // block_size, slots % block_size
            base = (block * num_heads + head) * head_size * block_size
            if name == "k":
                return base + (lane // x * block_size + slot) * x + lane % x
            return base + (slot // x * head_size + lane) * x + slot % x
        if not self.reads_strides:
            return (slots * num_heads + head) * head_size + lane
        if block_size:
            return (
                slots // block_size * cache.stride(0)
                + slots % block_size * cache.stride(1)
                + (head * cache.stride(2) + lane)
            )
        return slots * cache.stride(1) + head * cache.stride(2) + lane


# --- wrong in one step each ---------------------------------------------------------------------------------------


class OtherEps(Aiter):
    def norm(self, x, weight, eps, gemma):
        return super().norm(x, weight, 10 * eps, gemma)


class EpsOutsideTheRoot(Aiter):
    def norm(self, x, weight, eps, gemma):
        y = x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + eps)
        return (y * (weight.float() + gemma)).to(x.dtype)


class GemmaIgnored(Aiter):
    def norm(self, x, weight, eps, gemma):
        return super().norm(x, weight, eps, False)


class AxesSwapped(Aiter):
    def positions(self, positions, num_tokens):
        rows = super().positions(positions, num_tokens)
        return rows.flip(0) if rows.shape[0] == 3 else rows


class HeightAndWidthSwapped(Aiter):
    def positions(self, positions, num_tokens):
        rows = super().positions(positions, num_tokens)
        return rows[[0, 2, 1]] if rows.shape[0] == 3 else rows


class SectionsIgnored(Aiter):
    def axes(self, section, interleaved):
        return [0] * sum(section)


class AlwaysSectioned(Aiter):
    def axes(self, section, interleaved):
        return super().axes(section, False)


class PositionsReadAsContiguous(Aiter):
    def positions(self, positions, num_tokens):
        index = torch.arange(positions.shape[0] * num_tokens).view(positions.shape[0], num_tokens)
        return read(positions, torch.int64, index)


class OtherPairs(Aiter):
    def rotate(self, x, cos, sin, rotary_dim, is_neox):
        return super().rotate(x, cos, sin, rotary_dim, not is_neox)


class OtherDirection(Aiter):
    def rotate(self, x, cos, sin, rotary_dim, is_neox):
        return super().rotate(x, cos, -sin, rotary_dim, is_neox)


class RotaryDimIgnored(Aiter):
    """The table is read with the full width: out of bounds."""

    def rotary_dim(self, rotary_dim, head_size):
        return head_size

    def angles(self, cos_sin, dtype, positions, num_tokens, axes, rotary_dim):
        axes = [axes[i % len(axes)] for i in range(rotary_dim // 2)]
        return super().angles(cos_sin, dtype, positions, num_tokens, axes, rotary_dim)


class RestNotCopied(Aiter):
    def rotate(self, x, cos, sin, rotary_dim, is_neox):
        y = super().rotate(x, cos, sin, rotary_dim, is_neox)
        y[..., rotary_dim:] = 0
        return y


class OneHeadWrong(Aiter):
    def finish(self, q):
        q = q.clone()
        q[:, -1] *= 1.02
        return q


class OneLaneWrong(Aiter):
    def finish(self, q):
        q = q.clone()
        q[-1, -1, -1] = q[-1, -1, -2]
        return q


class VNotWritten(Aiter):
    def stored(self, k, k_unturned, v):
        return k, None


class KStoredBeforeRotation(Aiter):
    def stored(self, k, k_unturned, v):
        return k_unturned, v


class KAndVSwapped(Aiter):
    def stored(self, k, k_unturned, v):
        return v, k


class ScaleInverted(Aiter):
    def convert(self, value, scale, dtype):
        return super().convert(value, 1 / scale, dtype)


class ScaleIgnored(Aiter):
    def convert(self, value, scale, dtype):
        return super().convert(value, 1.0, dtype)


class RoundsToTheNextSmaller(Aiter):
    """By less than one unit of a float8."""

    def convert(self, value, scale, dtype):
        return super().convert(value.float() * 0.95, scale, dtype)


class WrongHeadStride(Aiter):
    """The strides of slots and heads, mistaken for each other's, where both are read from a view of rank 3."""

    def places(self, name, cache, slots, num_heads, head_size, shuffle, block_size, x):
        heads = torch.arange(num_heads)[:, None]
        right = super().places(name, cache, slots, num_heads, head_size, shuffle, block_size, x)
        step = right[:, 1:2, :1] - right[:, :1, :1]
        return right - heads * step // 2


class ReadsA3DCache(Aiter):
    """Slots from dimension 0, heads from dimension 1, whatever the rank."""

    def places(self, name, cache, slots, num_heads, head_size, shuffle, block_size, x):
        head, lane = torch.arange(num_heads)[:, None], torch.arange(head_size)
        return slots[:, None, None] * cache.stride(0) + head * cache.stride(1) + lane


class OffByOneSlot(Aiter):
    def places(self, name, cache, slots, num_heads, head_size, shuffle, block_size, x):
        return super().places(name, cache, slots + 1, num_heads, head_size, shuffle, block_size, x)


class OneSlotTwice(Aiter):
    """Right, and then writes one element that is not its own."""

    def places(self, name, cache, slots, num_heads, head_size, shuffle, block_size, x):
        places = super().places(name, cache, slots, num_heads, head_size, shuffle, block_size, x)
        raw(cache, cache.dtype)[int(places.max()) + 1] = 7.0
        return places


class WritesItsInput(Aiter):
    def run(self, qkv, *rest):
        super().run(qkv, *rest)
        qkv[-1, -1] += 1


class NegativeSlotsWritten(Aiter):
    """Instead of skipped: to the first slot."""

    def run(self, *arguments):
        arguments = list(arguments)
        arguments[16] = arguments[16].clamp(min=0)
        super().run(*arguments)
