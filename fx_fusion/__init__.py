"""Find, prove and fuse the attention prologue of any model: ``torch.compile(model, backend="fx_fusion")``."""

from fx_fusion.backend import NotFused, register
from fx_fusion.config import Config, OptionError
from fx_fusion.decline import CODES, Decline
from fx_fusion.function_fusions.fusion import Found
from fx_fusion.function_fusions.shipped import QkNormRope, SwiGLU
from fx_fusion.fusion import Fusion, Handle
from fx_fusion.fusion_pass import FusionPass
from fx_fusion.graph_capture.hazards import Hazard, HazardReport, capture_hazards
from fx_fusion.graph_capture.warm import NotWarm, Warmup, refuse_compilation_in_captures, warmup
from fx_fusion.kernel_registration import load_installed, register_kernel
from fx_fusion.kernels.capture_guard import FirstUseInCapture
from fx_fusion.kernels.operation import Implementation, KernelUnavailable
from fx_fusion.kernels.qk_norm_rope_cache.call import Call
from fx_fusion.kernels.qk_norm_rope_cache.operation import qk_norm_rope_cache
from fx_fusion.kernels.target import Target
from fx_fusion.patterns.qk_norm_rope_cache.fusion import QkNormRopeCache
from fx_fusion.registration import fusions, register_fusion
from fx_fusion.report import FusionReport, LayerReport, last_report
from fx_fusion.semantics.declare import MeaningHandle, declare_meaning
from fx_fusion.trace import explain
from fx_fusion.version import __version__

__all__ = [
    "CODES",
    "Call",
    "Config",
    "Decline",
    "FirstUseInCapture",
    "Found",
    "Fusion",
    "FusionPass",
    "FusionReport",
    "Handle",
    "Hazard",
    "HazardReport",
    "Implementation",
    "KernelUnavailable",
    "LayerReport",
    "MeaningHandle",
    "NotFused",
    "NotWarm",
    "OptionError",
    "QkNormRope",
    "QkNormRopeCache",
    "SwiGLU",
    "Target",
    "Warmup",
    "__version__",
    "capture_hazards",
    "declare_meaning",
    "explain",
    "fusions",
    "last_report",
    "qk_norm_rope_cache",
    "register_fusion",
    "register_kernel",
    "warmup",
]

register_fusion(QkNormRopeCache())
load_installed()
register()
refuse_compilation_in_captures()
