"""All that the snapshots know of the package beyond its public names, and of how Inductor calls the pass.

Of the package: ``fx_fusion.FusionPass``, ``Config``, ``explain``, ``last_report``, and from inside
``fx_fusion.report.REPORTS.clear`` (what was compiled before must not show).
Of the tests: ``mutation.campaign.mutants_of``, whose mutants hold a ``module`` and a ``description``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule

import fx_fusion
from fx_fusion.report import REPORTS

#: Under which options each graph is given to the pass.
CONFIGS = {
    "reference": fx_fusion.Config(kernel="reference", strict=True),
    "auto on gfx942": fx_fusion.Config(target="gfx942", strict=True),
}


@dataclass(frozen=True)
class Passed:
    """One graph after the pass under one configuration: `report` (JSON) and `graph`, or what was `raised`."""

    title: str
    report: str | None = None
    graph: Graph | None = None
    raised: str | None = None


def compiled(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    dynamic: bool | None = False,
    inference_mode: bool = False,
) -> list[Passed]:
    """Trace ``fn(*args, **kwargs)`` as Inductor does, give copies of each graph to the pass, and run the original."""
    found: list[Passed] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.fx_passes.post_grad import view_to_reshape

        def inner(traced: GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
            view_to_reshape(traced)
            found.extend(passed(traced, is_inference=bool(options.get("is_inference"))))
            return _boxed(traced)

        patches = {"force_disable_caches": True}
        return compile_fx(gm, list(example_inputs), inner_compile=inner, config_patches=patches)  # type: ignore[arg-type]

    with torch.inference_mode() if inference_mode else contextlib.nullcontext(), torch.no_grad():
        torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


def passed(traced: GraphModule, *, is_inference: bool = True) -> Iterator[Passed]:
    """A copy of `traced` after the pass, for each configuration."""
    for title, config in CONFIGS.items():
        module = GraphModule(traced, copy.deepcopy(traced.graph))
        REPORTS.clear()
        try:
            fx_fusion.FusionPass(config)(module.graph, is_inference)
        except Exception as error:
            yield Passed(title, raised=f"{type(error).__name__}: {error}")
            continue
        report = fx_fusion.last_report()
        assert report is not None
        yield Passed(title, report.to_json(), module.graph)


def explained(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], target: str) -> list[Passed]:
    report = fx_fusion.explain(fn, *args, target=target, **kwargs)
    return [Passed(f"explained for {target}", report.to_json())]


def mutated(name: str, count: int) -> list[Passed]:
    """`count` mutants of one member of the corpus."""
    from mutation.campaign import mutants_of

    found: list[Passed] = []
    for mutant in mutants_of(name, count, seed=0):
        found.append(Passed(f"mutant: {mutant.description}"))
        found.append(next(passed(mutant.module)))
    return found


def _boxed(gm: GraphModule) -> Callable[[list[Any]], Any]:
    def call(inputs: list[Any]) -> Any:
        arguments = list(inputs)
        inputs.clear()
        return gm(*arguments)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call
