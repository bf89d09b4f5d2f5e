"""What the plug-in changes in vLLM: the pass in its configuration, the store in the graph, and a line at start."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from fx_fusion.engines.vllm.graph_pass import VllmFusionPass
from fx_fusion.engines.vllm.names import PASS_KEY, STORE, CompilationConfig, CompilationMode, WorkerWrapperBase, logger
from fx_fusion.engines.vllm.summary import Summary, start_watching
from fx_fusion.engines.vllm.switch import Switch


class NotFused(RuntimeError):
    """``require`` was asked for, and a layer is not fused."""


def install() -> None:
    """Follow vLLM's start. More than once is once."""
    _around(CompilationConfig, "set_splitting_ops_for_v1", _configure)
    # Not `init_worker`: a process of its own loads plug-ins in there.
    _around(WorkerWrapperBase, "init_device", _watch)


def _remade(*sent: Any) -> VllmFusionPass:
    """In a worker, where nothing else may have asked for the plug-in."""
    install()
    return VllmFusionPass.remade(*sent)


copyreg.pickle(VllmFusionPass, lambda each: (_remade, each.sent()))


def _around(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    """Have ``hook(original, *args, **kwargs)`` called in the place of ``owner.name``."""
    original = getattr(owner, name)
    if getattr(original, "fx_fusion", False):
        return

    @functools.wraps(original)
    def around(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    around.fx_fusion = True  # type: ignore[attr-defined]
    setattr(owner, name, around)


def _configure(original: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    """The last word on a compilation's configuration, after the platform's."""
    switch = _switch(config)
    if switch is None:
        return original(config, *args, **kwargs)
    chosen = config.splitting_ops is not None or config.use_inductor_graph_partition
    result = original(config, *args, **kwargs)
    if config.mode == CompilationMode.NONE:
        logger.warning_once("fx_fusion: nothing is compiled (enforce_eager, or a feature that turns it off): no fusion")
        return result
    if not chosen and config.splitting_ops:
        # Split off by default, the store would be in no graph that a pass sees.
        config.splitting_ops = [name for name in config.splitting_ops if name != STORE]
    _add_pass(config.inductor_compile_config, switch)
    return result


def _switch(config: Any) -> Switch | None:
    """What the configuration says, else the environment."""
    given = config.inductor_compile_config.get(PASS_KEY)
    return given.switch if isinstance(given, VllmFusionPass) else Switch.from_environment()


def _add_pass(passes: dict[str, Any], switch: Switch) -> None:
    before = passes.get(PASS_KEY)
    if not isinstance(before, VllmFusionPass):
        passes[PASS_KEY] = VllmFusionPass(switch.kernel, require=switch.require, before=before)


def _watch(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Have the worker say, once it has compiled and warmed up, what was fused."""
    result = original(wrapper, *args, **kwargs)
    config = wrapper.vllm_config
    switch = _switch(config.compilation_config)
    if switch is None or config.compilation_config.mode == CompilationMode.NONE:
        return result
    before = start_watching()
    worker = wrapper.worker
    warm_up = worker.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def warmed_up(*args: Any, **kwargs: Any) -> Any:
        result = warm_up(*args, **kwargs)
        _tell(Summary.of(config, before), switch, config)
        return result

    worker.compile_or_warm_up_model = warmed_up
    return result


def _tell(summary: Summary, switch: Switch, config: Any) -> None:
    if switch.require and summary.missing:
        raise NotFused(f"{summary} (FX_FUSION_VLLM={switch.kernel},require)")
    if config.parallel_config.rank % config.parallel_config.tensor_parallel_size == 0:
        (logger.warning if summary.missing else logger.info)("%s", summary)
