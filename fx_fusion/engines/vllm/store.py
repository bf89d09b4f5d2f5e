"""vLLM's store, declared: which operation it is, what the fused call becomes, and who does not read the key."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from fx_fusion.engines.vllm.cache_views import reads_cache_only
from fx_fusion.engines.vllm.names import ATTENTION, STORE, Attention, get_forward_context, is_forward_context_available
from fx_fusion.engines.vllm.operation import OPERATION
from fx_fusion.graph.custom_calls import FusedCall, OpaqueCall, operation
from fx_fusion.graph.edit import Emitter
from fx_fusion.graph.operations import value_of
from fx_fusion.semantics.hidden_stores import HiddenStore, Named

_TENSORS = ("q", "k", "v", "q_weight", "k_weight", "cos", "sin", "positions")
_OPTIONS = ("q_eps", "k_eps", "gemma_norm", "rotary_dim", "is_neox", "axes", "return_k", "implementation")


def _insert(emit: Emitter, store: OpaqueCall, fused: FusedCall) -> Named:
    tensors = [fused.tensors[name] for name in _TENSORS]
    options = [fused.options[name] for name in _OPTIONS]
    q, k = value_of(fused.node)[:2]
    with q.fake_mode:
        done = k.new_empty(0)
    call = emit.call_with_value((q, k, done), OPERATION, *tensors, store.arguments["layer_name"], *options)
    q_out, k_out, waits = (emit.call(operator.getitem, call, i) for i in range(3))
    return Named(q_out, k_out, (waits,))


def _unread(store: OpaqueCall) -> Sequence[Node]:
    """Attention that waits for this store and takes its key, where every layer's attention reads the cache alone.

    The layer's name is an input of the graph, so the layers of the model have to be of one mind.
    """
    if not _all_read_cache_only():
        return ()
    users = [user for user in store.node.users if _is_attention(user)]
    return [user for user in users if user.kwargs.get("key") is store.arguments["key"]]


def _is_attention(node: Node) -> bool:
    op = operation(node)
    return op is not None and op._schema.name == ATTENTION


def _all_read_cache_only() -> bool:
    if not is_forward_context_available():
        return False
    layers: Any = get_forward_context().no_compile_layers.values()
    return all(reads_cache_only(layer) for layer in layers if isinstance(layer, Attention))


VLLM_STORE = HiddenStore(STORE, "key", "value", _insert, _unread)
