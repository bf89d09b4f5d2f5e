"""Every private name of PyTorch that the package uses, once, and what for. Tried with 2.11, 2.13 and 2.14.

What ``import torch`` and naming a backend load anyway is imported here; what is heavy is imported where it is called.
"""

# ruff: noqa: F401
# pyright: reportUnusedImport=false
from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher  # decompositions, while tracing
from torch._dynamo import config as dynamo_config  # how values that the host reads are traced
from torch._dynamo import register_backend  # the name in torch.compile(backend=…)
from torch._dynamo import reset as reset_dynamo  # forget what was compiled
from torch._dynamo.backends import registry
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler  # told when a compilation starts
from torch._dynamo.utils import counters  # Inductor keeps some with each compiled graph
from torch._guards import TracingContext, tracing  # which addresses are fixed; a trace apart from a compilation
from torch._higher_order_ops.auto_functionalize import (  # a mutable operation made functional, and what it writes
    AliasViewInfo,
    AsStridedViewInfo,
    NotView,
    SliceViewInfo,
    auto_functionalized,
    auto_functionalized_v2,
    get_mutable_args,
    read_view_information_from_args,
)
from torch._higher_order_ops.triton_kernel_wrap import (  # a launch that Inductor makes itself
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._inductor import custom_graph_pass, inductor_prims
from torch._library.custom_ops import CustomOpDef  # what torch.library.custom_op makes
from torch._logging import trace_structured  # reports beside Inductor's own artifacts
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket  # what a node calls
from torch._subclasses.fake_tensor import (  # tensors without values
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode  # changes in place as results
from torch.fx.experimental.proxy_tensor import make_fx  # a function as a graph
from torch.fx.experimental.symbolic_shapes import (  # what is known of sizes, and which depend on data
    ShapeEnv,
    free_unbacked_symbols,
    statically_known_true,
)
from torch.utils import _pytree as pytree  # leaves of nested arguments
from torch.utils._python_dispatch import TorchDispatchMode  # every operation, as something else
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes  # whoever else is tracing
from torch.utils._sympy.functions import FloorDiv, Min  # in the expressions of sizes

#: Told whether the graph is for inference, in the versions that tell a pass.
InferenceAwarePass: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
GraphPass: Any = InferenceAwarePass or custom_graph_pass.CustomGraphPass

#: The ``__torch_function__`` of a tensor that has none.
NO_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl

#: Has Inductor a fused multiply-add, which Dynamo makes of ``addcmul_`` with a factor?
HAS_FMA = hasattr(inductor_prims, "fma")

#: Where every operation that refuses its fake operands leaves a traceback.
FAKE_TENSOR_LOG = logging.getLogger("torch._subclasses.fake_tensor")


def compile_fx(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
    """Inductor's whole pipeline; with the option `inner_compile`, all that comes before its post-grad passes."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs), **options)


def view_to_reshape(gm: torch.fx.GraphModule) -> None:
    """What Inductor does to a graph before it calls the first custom pass."""
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    view_to_reshape(gm)


def move_constructors(graph: torch.fx.Graph, device: str) -> None:
    """Inductor makes there what the graph makes on the CPU for it alone."""
    from torch._inductor.fx_passes.post_grad import ConstructorMoverPass

    ConstructorMoverPass(device)(graph)


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Those that Inductor applies."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def aot_module(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
    """AOTAutograd without Inductor."""
    from torch._functorch.aot_autograd import aot_module_simplified

    return aot_module_simplified(gm, list(example_inputs), **options)


def sort_topologically(graph: torch.fx.Graph) -> None:
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def inductor_option(name: str) -> Any:
    """An option as it stands."""
    from torch._inductor import config

    return getattr(config, name)


def mode_options(mode: str | None) -> dict[str, Any]:
    """The options that a ``torch.compile`` mode stands for."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode) if mode and mode != "default" else {}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options as ``torch.compile`` itself checks them (``epilogue-fusion`` is ``epilogue_fusion``)."""
    checked = torch._TorchCompileInductorWrapper("default", dict(options), None)
    return {name: checked.config[name] for name in (key.replace("-", "_") for key in options)}


def is_backend(name: str) -> bool:
    return name in registry._COMPILER_FNS


def inductor_cache() -> str:
    """The directory of Inductor's compile cache, which this makes."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def uncapturable_operations() -> Collection[str]:
    """Names of those that Inductor puts into no CUDA graph, as far as it lists any."""
    from torch._inductor import utils

    return getattr(utils, "FORBIDDEN_CUDAGRAPH_OPS", ())


def unwrapped(tensor: FunctionalTensor) -> torch.Tensor:
    """What a functional tensor holds now."""
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors, fake ones too, that lie in one memory."""
    return tensor.untyped_storage()._cdata


def hints(env: ShapeEnv) -> Mapping[Any, int]:
    """The sizes with which a graph was traced, by symbol; symbols that depend on data have none."""
    known: Any = env
    return known.backed_var_to_val if hasattr(known, "backed_var_to_val") else known.var_to_val
