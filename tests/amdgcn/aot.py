"""Compile a launch of a Triton kernel for a GPU that need not be there, specialised as Triton's JIT would do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

CDNA = ("gfx942", "gfx950", "gfx90a")
RDNA = ("gfx1100", "gfx1201")
WAVE_SIZES = {**dict.fromkeys(CDNA, 64), **dict.fromkeys(RDNA, 32)}


@dataclass(frozen=True)
class Binary:
    """One compiled launch. `arguments` are those that the kernel is given when it starts, in order."""

    arch: str
    assembly: str
    lds_bytes: int
    num_warps: int
    arguments: dict[str, Any]
    attributes: dict[str, dict[str, int]]


def compile_kernel(kernel: Any, arguments: Mapping[str, Any], arch: str, num_warps: int) -> Binary:
    """Compile `kernel` for the values of all of its parameters; tensors may be on any device, the meta device too.

    The JIT's own binder decides what the compiler is told: which pointers and numbers 16 divides, which buffers are
    small enough for 32-bit offsets, and which arguments are constants (None, and integers that equal 1).
    """
    target = GPUTarget("hip", arch, WAVE_SIZES[arch])
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(**arguments, num_warps=num_warps)
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=dataclasses.asdict(options))
    names = list(signature)
    return Binary(
        arch,
        compiled.asm["amdgcn"],
        compiled.metadata.shared,
        num_warps,
        {name: bound[name] for name in names if signature[name] != "constexpr"},
        {names[index]: dict(pairs) for (index,), pairs in attributes.items()},
    )
