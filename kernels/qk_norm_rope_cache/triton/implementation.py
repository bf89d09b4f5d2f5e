"""The Triton kernel: its contract, and a launch now."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_fusion.graph.edit import STAND_IN, Emitter
from fx_fusion.kernels.insert import Results
from fx_fusion.kernels.operation import Implementation, Operation
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, values
from fx_fusion.kernels.qk_norm_rope_cache.triton.insert import insert_launch
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import (
    ACTIVATIONS,
    FLOAT8,
    MAX_AXES,
    MAX_HEAD_DIM,
    Launch,
    as_bytes,
    dtype_names,
    kernel,
    plan,
    rule_of,
    wave_size_of,
)
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, candidates, tile_from_json, tile_to_json
from fx_fusion.kernels.target import Target
from fx_fusion.kernels.versions import triton_version


class Triton(Implementation[Call[Tensor]]):
    """One kernel for CUDA and ROCm; in a graph, a launch that Inductor makes itself."""

    name = "triton"
    home = Target("cuda")

    def version(self) -> str | None:
        return triton_version()

    def unavailable(self, target: Target) -> str | None:
        if target.platform not in ("cuda", "hip"):
            return f"Triton kernels run on GPUs, the target is {target.name}"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        return None

    def remedy(self, target: Target) -> str | None:
        return "install the Triton that belongs to this torch" if target.platform in ("cuda", "hip") else None

    def refuses(self, call: Call[Tensor], target: Target) -> str | None:
        return refuses(call, target)

    def run(self, call: Call[Tensor], setting: Tile | None = None) -> tuple[Tensor, Tensor]:
        return launch(call, setting)

    def insert(self, emit: Emitter, operation: Operation[Call[Tensor]], call: Call[Node]) -> Results:
        if STAND_IN in call.k_cache.meta:  # for a cache that an operation finds when it runs
            return super().insert(emit, operation, call)
        return insert_launch(emit, call)

    def settings(self, call: Call[Tensor]) -> list[Tile]:
        others = candidates(call.k.shape[2], call.q.shape[3], wave_size_of(call.q.device))
        return list(dict.fromkeys([rule_of(call), *others]))

    def setting_to_json(self, setting: Tile) -> dict[str, Any]:
        return tile_to_json(setting)

    def setting_from_json(self, content: Mapping[str, Any]) -> Tile:
        return tile_from_json(content)


# --- the contract -----------------------------------------------------------------------------------------------------


def refuses(call: Call[Tensor], target: Target) -> str | None:
    """What the kernel would read as something else, or would not notice itself."""
    told, caches = call.options, (*ACTIVATIONS, *FLOAT8)
    weights = [None if weight is None else weight.dtype for weight in (call.q_weight, call.k_weight)]
    dtypes = [each.dtype for each in (call.q, call.k, call.v)]
    if call.q.dtype not in ACTIVATIONS:
        return f"argument q: expected one of {dtype_names(ACTIVATIONS)}, found {call.q.dtype}"
    if len(set(dtypes)) > 1:
        return f"arguments q, k, v: expected one dtype, found {dtype_names(dtypes)}"
    for name, cache in (("k_cache", call.k_cache), ("v_cache", call.v_cache)):
        if cache.dtype not in caches:
            return f"argument {name}: expected one of {dtype_names(caches)}, found {cache.dtype}"
    if not set(weights) <= {None, *ACTIVATIONS}:
        found = dtype_names(sorted({weight for weight in weights if weight is not None}, key=str))
        return f"argument q_weight: expected one of {dtype_names(ACTIVATIONS)}, found {found}"
    if weights[0] != weights[1]:
        return f"arguments q_weight, k_weight: expected two of one dtype or none, found {tuple(weights)}"
    if (told.q_eps is None) != (told.k_eps is None):
        return f"arguments q_eps, k_eps: expected two or none, found {told.q_eps}, {told.k_eps}"
    for name, angles in (("cos", call.cos), ("sin", call.sin)):
        if angles.dtype not in ACTIVATIONS:
            return f"argument {name}: expected one of {dtype_names(ACTIVATIONS)}, found {angles.dtype}"
    for name, cache in (("k_cache", call.k_cache), ("v_cache", call.v_cache)):
        if cache.dtype == torch.float8_e4m3fnuz and target.platform == "cuda":
            return f"argument {name}: {cache.dtype} is AMD's; Triton has no such pointers on {target.name}"
    if call.q.shape[3] > MAX_HEAD_DIM:
        return f"argument head_dim: expected at most {MAX_HEAD_DIM}, found {call.q.shape[3]}"
    if call.positions is not None and call.positions.shape[0] > MAX_AXES:
        return f"argument positions: expected at most {MAX_AXES} axes, found {call.positions.shape[0]}"
    return None


# --- a launch now -----------------------------------------------------------------------------------------------------


def launch(call: Call[Tensor], tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Raises:
        ValueError: for what the contract refuses, and for tensors that are not on a GPU.
    """
    q, k = call.q, call.k
    if q.device.type != "cuda":
        raise ValueError(
            f"argument q: expected a tensor on a CUDA or ROCm device for implementation='triton', found {q.device}"
        )
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device) if call.options.return_k else None
    planned = _plan_once(call, tile)
    if planned.grid[0]:
        *inputs, k_cache, v_cache = call.tensors.values()
        with torch.cuda.device(q.device):
            kernel()[planned.grid](
                *inputs,
                *(as_bytes(cache) for cache in (k_cache, v_cache)),
                q_out,
                k_out,
                *planned.arguments.values(),
                *planned.constants.values(),
                num_warps=planned.tile.num_warps,
            )
    return q_out, k_out if k_out is not None else q_out.new_empty(0)


#: Plans of calls that ran: making one takes the host longer than a launch, and a model makes few kinds of calls.
_plans: dict[Any, Launch] = {}
_MOST_PLANS = 1024


def _plan_once(call: Call[Tensor], tile: Tile | None) -> Launch:
    """The plan of this call; of calls that differ in the tensors' contents alone, made once. So are the contract's
    check and the look for a measured tile, which takes a file's date.
    """
    seen = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in call.tensors.values()]
    asked = (*seen, tile, *values(call.options))
    found = _plans.get(asked)
    if found is None:
        reason = refuses(call, Target.of(call.q.device))
        if reason is not None:
            raise ValueError(reason)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        found = _plans[asked] = plan(call, tile)
    return found
