"""Programmatic dependent launch in the code that Inductor writes.

Triton takes the launch option `launch_pdl`. Inductor hands it on from the metadata of a kernel, where it puts it for
kernels of its own alone; for one that a graph brings along there is no way to ask for it. And PyTorch reads what such a
kernel writes off its code, gives up where it meets the wait, and takes every operand for written, which CUDA graphs
refuse. So a graph holds the kernel without its wait, marked, and the definition that Inductor writes gets the wait and
the option, both or neither. Where PyTorch comes to write definitions in another form, the kernel is launched as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch._inductor.codegen.wrapper import PythonWrapperCodegen

_CONSTANT = "WAITS_FOR_PREDECESSOR"
#: As false as False, but told from it in what Inductor writes.
_MARK = 0
_MARKED = f"'{_CONSTANT}': {_MARK!r}"
_WAITS = f"'{_CONSTANT}': {True!r}"
_METADATA = "triton_meta={"


def constants_in_graph(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a launch, as a graph holds them for Inductor."""
    if not constants[_CONSTANT]:
        return dict(constants)
    _complete_definitions()
    return {**constants, _CONSTANT: _MARK}


def launched_early(definition: str) -> str:
    """The definition of a kernel, as Inductor writes it, with wait and option where it is marked; else as it is."""
    if _MARKED not in definition or _METADATA not in definition:
        return definition
    definition = definition.replace("'launch_pdl': False, ", "", 1).replace(_MARKED, _WAITS)
    return definition.replace(_METADATA, f"{_METADATA}'launch_pdl': True, ", 1)


@functools.cache
def _complete_definitions() -> None:
    """From now on, in this process. Definitions of other kernels stay as they are."""
    define_kernel = PythonWrapperCodegen.define_kernel

    @functools.wraps(define_kernel)
    def define(self: PythonWrapperCodegen, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> None:
        define_kernel(self, kernel_name, launched_early(kernel_body), *args, **kwargs)

    PythonWrapperCodegen.define_kernel = define
