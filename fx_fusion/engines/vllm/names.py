"""Every name of vLLM's that the plug-in uses, once. Read from vLLM 0.32."""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.compilation.passes.inductor_pass import InductorPass as _InductorPass
from vllm.config import CompilationConfig as _CompilationConfig
from vllm.config import CompilationMode as _CompilationMode
from vllm.forward_context import get_forward_context as _get_forward_context
from vllm.forward_context import is_forward_context_available as _is_forward_context_available
from vllm.logger import init_logger as _init_logger
from vllm.model_executor.layers.attention import Attention as _Attention
from vllm.model_executor.layers.attention.attention import get_attention_context as _get_attention_context
from vllm.platforms import current_platform as _current_platform
from vllm.utils.torch_utils import _resolve_layer_name
from vllm.utils.torch_utils import direct_register_custom_op as _direct_register_custom_op
from vllm.v1.worker.worker_base import WorkerWrapperBase as _WorkerWrapperBase

if TYPE_CHECKING:
    LayerNameType = str | object
else:
    from vllm.utils.torch_utils import LayerNameType as LayerNameType

# vLLM's annotations are not those of a typed package: what crosses the border is Any.
InductorPass: Any = _InductorPass
CompilationConfig: Any = _CompilationConfig
CompilationMode: Any = _CompilationMode
Attention: Any = _Attention
WorkerWrapperBase: Any = _WorkerWrapperBase
current_platform: Any = _current_platform
direct_register_custom_op: Any = _direct_register_custom_op
get_attention_context: Any = _get_attention_context
get_forward_context: Any = _get_forward_context
init_logger: Any = _init_logger
is_forward_context_available: Any = _is_forward_context_available
resolve_layer_name: Any = _resolve_layer_name

#: Its messages take the format and the level of vLLM's.
logger: Any = init_logger("vllm.fx_fusion")

#: Inductor's hook that vLLM adds a user's pass to its own by.
PASS_KEY = "post_grad_custom_post_pass"

STORE = "vllm::unified_kv_cache_update"
ATTENTION = "vllm::unified_attention_with_output"
