"""What the pass did with a subject, as text that is the same on every run: the report, and the graph node by node."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch.fx import Node

from goldens.adapter import Passed
from goldens.subjects import Subject

_FILE = re.compile(r"(?:[\w.+\-]*/)*([\w.\-]+\.py)(?::\d+)?")
_ADDRESS = re.compile(r"0x[0-9a-f]+")
#: Where in the package a declared meaning lies.
_MODULE = re.compile(r"\bfx_fusion(?:\.\w+)*\.(?=\w)")
#: A number that was measured, other than one that the graph holds.
_MEASURED = re.compile(r"\d+\.\d{3,}(?:e[+-]\d+)?")
_COMPARED = re.compile(r"(compared on \w+): [\d.e+\-]+")


def text(subject: Subject) -> str:
    torch._dynamo.reset()
    torch.manual_seed(0)
    try:
        return "\n\n".join(map(_passed, subject.run())) + "\n"
    finally:
        torch._dynamo.reset()  # this also empties the table of Triton kernels, which the text is read from


def digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _passed(passed: Passed) -> str:
    lines = [f"== {_words(passed.title)}"]
    if passed.raised is not None:
        lines.append(f"raised {_words(passed.raised)}")
    if passed.report is not None:
        lines.append(json.dumps(_report(passed.report), indent=1, sort_keys=True))
    if passed.graph is not None:
        lines.extend(map(_node, passed.graph.nodes))
    return "\n".join(lines)


# --- the report -----------------------------------------------------------------------------------------------------


def _report(given: str) -> Any:
    report = json.loads(given)
    del report["seconds"]
    for layer in report["layers"]:
        # Rounding of this machine shows in what was measured: two digits are kept.
        if layer["reason"]:
            layer["reason"] = _MEASURED.sub(lambda found: f"{float(found[0]):.1e}", layer["reason"])
        layer["error"] = layer["error"] if layer["error"] is None else _magnitude(layer["error"])
    return _plain(report)


def _magnitude(error: float) -> str:
    return next((f"below {limit}" for limit in ("1e-9", "1e-3") if error < float(limit)), "large")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return _words(value) if isinstance(value, str) else value


def _words(words: str) -> str:
    """Without folders, lines, addresses, and what was measured on this machine."""
    words = _ADDRESS.sub("0x", _FILE.sub(r"\1", words))
    return _COMPARED.sub(r"\1", _MODULE.sub("", words))


# --- the graph ------------------------------------------------------------------------------------------------------


def _node(node: Node) -> str:
    arguments = ", ".join([*map(_argument, node.args), *(f"{k}={_keyword(k, v)}" for k, v in node.kwargs.items())])
    return f"{node.name}: {_value(node.meta.get('val'))} = {node.op} {_target(node.target)}({arguments})"


def _target(target: Any) -> str:
    if isinstance(target, (str, torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return str(target)
    return getattr(target, "__name__", type(target).__name__)


def _keyword(name: str, value: Any) -> str:
    """A Triton kernel and its constants are numbers in tables of the process."""
    if name == "kernel_idx":
        return kernel_side_table.get_kernel(value).fn.__name__
    return _argument(kernel_side_table.get_constant_args(value) if name == "constant_args_idx" else value)


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_argument(each)}' for key, each in value.items())}}}"
    if isinstance(value, (Node, torch.SymInt, torch.SymFloat)):
        return f"%{value}" if isinstance(value, Node) else str(value)
    return _words(repr(value))


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{[*map(str, value.shape)]}{[*map(str, value.stride())]}".replace("'", "")
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_value, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(each)}' for key, each in value.items())}}}"
    return str(value) if isinstance(value, (torch.SymInt, torch.SymFloat, int, float)) else type(value).__name__
