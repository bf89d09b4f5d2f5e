"""The model that a command is asked about: a Transformers class and a configuration, or the user's own factory."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fx_fusion.config import Config
from fx_fusion.observer import Observer
from fx_fusion.report import FusionReport
from fx_fusion.trace import explain_to

PHASES = ("decode", "prefill")


class SubjectError(ValueError):
    """What was asked for cannot be built. The message says what to ask for."""


@dataclass(frozen=True)
class Subject:
    """A function or module and the arguments to trace it with; `title` and `notes` are for people."""

    fn: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    title: str = ""
    notes: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that :func:`build` reads."""
    parser.add_argument(
        "factory", nargs="?", metavar="MODULE:FACTORY",
        help="a function of yours, as package.module:function or file.py:function, that takes nothing and returns "
        "(model, args) or (model, args, kwargs); build it under torch.device('meta') and nothing is allocated",
    )  # fmt: skip
    group = parser.add_argument_group("a Transformers model, without weights")
    group.add_argument("--transformers", metavar="CLASS", help="for example Qwen3VLTextModel")
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="its config.json (default: the class's own defaults)"
    )
    group.add_argument("--phase", choices=PHASES, default="decode", help="one token a sequence, or --tokens of them")
    group.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences (default: 1)")
    group.add_argument("--tokens", type=_positive, default=512, metavar="N", help="of a prefill step (default: 512)")
    group.add_argument("--cache", type=_positive, default=4096, metavar="N", help="slots a sequence (default: 4096)")
    group.add_argument("--layers", type=_positive, metavar="N", help="so many layers instead of the configuration's")
    group.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def build(arguments: argparse.Namespace) -> Subject:
    """The model that the arguments describe.

    Raises:
        SubjectError: it cannot be built.
    """
    if bool(arguments.factory) == bool(arguments.transformers):
        raise SubjectError("name one model: MODULE:FACTORY for your own, or --transformers CLASS --config FILE")
    return _own(arguments.factory) if arguments.factory else _from_transformers(arguments)


def explain_quietly(observer: Observer, subject: Subject, config: Config) -> FusionReport:
    """As :func:`fx_fusion.trace.explain_to`, without what Dynamo warns of while it traces somebody else's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explain_to(observer, subject.fn, subject.args, subject.kwargs, config)


# --- the user's own -------------------------------------------------------------------------------------------------


def _own(name: str) -> Subject:
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise SubjectError(f"expected package.module:function or file.py:function, got {name!r}")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise SubjectError(f"{place} has no function {attribute!r}")
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise SubjectError(
            f"{name} must return (model, args) or (model, args, kwargs) with a callable model, got {_describe(made)}"
        )
    model: Any = made[0]
    args: Any = made[1]
    kwargs: Any = made[2] if len(made) == 3 else {}
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise SubjectError(f"{name}: args must be a tuple and kwargs a dict, got {_describe(made)}")
    return Subject(model, tuple(args), dict(kwargs), title=name)


def _describe(made: Any) -> str:
    return f"({', '.join(type(each).__name__ for each in made)})" if isinstance(made, tuple) else type(made).__name__


def _module(name: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SubjectError(f"module {name!r} cannot be imported from {Path.cwd()}: {error}") from error


def _module_of_file(path: Path) -> Any:
    if not path.exists():
        raise SubjectError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


# --- Transformers ---------------------------------------------------------------------------------------------------


def _from_transformers(arguments: argparse.Namespace) -> Subject:
    cls = _class(arguments.transformers)
    config = _config(cls, arguments.config)
    if arguments.layers:
        _cut(config, arguments.layers)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    with torch.device("meta"):
        model = cls(config).to(dtype).eval()
    batch, tokens = arguments.batch, 1 if arguments.phase == "decode" else arguments.tokens
    kwargs: dict[str, Any] = {
        "input_ids": torch.zeros(batch, tokens, dtype=torch.int64),
        "past_key_values": _cache(config, arguments.cache),
    }
    if _has_three_axes(config):
        kwargs["position_ids"] = torch.zeros(3, batch, tokens, dtype=torch.int64)
    sizes = f"{arguments.phase}: {batch} × {tokens} tokens, a static cache of {arguments.cache} slots"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    notes = (sizes, f"{parameters / 1e9:.1f}e9 parameters in {arguments.dtype}, none of them allocated")
    title = f"{arguments.transformers}, {arguments.config.name}" if arguments.config else arguments.transformers
    return Subject(model, (), kwargs, title=title, notes=notes)


def _class(name: str) -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise SubjectError("--transformers needs the package: pip install 'transformers>=5.17'") from error
    cls = getattr(transformers, name, None)
    if cls is None or getattr(cls, "config_class", None) is None:
        raise SubjectError(
            f"transformers {transformers.__version__} has no model class {name!r}; expected one such as "
            "Qwen3VLTextModel or Qwen3ForCausalLM"
        )
    return cls


def _config(cls: Any, path: Path | None) -> Any:
    if path is None:
        return cls.config_class()
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SubjectError(f"--config {path} cannot be read as JSON: {error}") from error
    wanted = cls.config_class.model_type
    # A multimodal model's file holds its text model's configuration.
    nested = [each for each in content.values() if isinstance(each, dict) and each.get("model_type") == wanted]
    found = content if content.get("model_type") in (wanted, None) else nested[0] if nested else None
    if found is None:
        raise SubjectError(
            f"--config {path} is of model_type {content.get('model_type')!r}; {cls.__name__} expects {wanted!r}"
        )
    return cls.config_class.from_dict(found)


def _cut(config: Any, layers: int) -> None:
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]


def _cache(config: Any, slots: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=config.get_text_config(), max_cache_len=slots)


def _has_three_axes(config: Any) -> bool:
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return "mrope_section" in rope
