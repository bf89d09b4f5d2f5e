"""`python -m fx_fusion explain`: factories, Transformers classes, files for programs, and what changed between two."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from fx_fusion.cli import explain, subject
from fx_fusion.report import FusionReport, LayerReport
from fx_fusion.reporting.diff import compare

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "examples" / "configs"


def run(*arguments):
    commands = argparse.ArgumentParser().add_subparsers()
    explain.add_to(commands)
    chosen = commands.choices["explain"].parse_args([str(argument) for argument in arguments])
    return chosen.run(chosen)


def report(path):
    return FusionReport.from_json(json.dumps(json.loads(path.read_text())["report"]))


# --- what is explained ----------------------------------------------------------------------------------------------


def test_a_factory_in_a_file(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert run(f"{HERE}/two_layers.py:clamped", "--target", "gfx942", "--json", path) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 layers fused" in printed
    assert "proof.not_analytic at " in printed and "two_layers.py:11" in printed
    assert "triton: could serve" in printed
    assert [layer.state for layer in report(path).layers] == ["rewritten", "declined", "rewritten"]
    assert [layer.module for layer in report(path).layers] == ["layers.0", "layers.1", "layers.2"]


def test_require_is_for_scripts(capsys):
    assert run("two_layers:shorter", "--target", "gfx942", "--require", 2) == 0
    assert run("two_layers:shorter", "--target", "gfx942", "--require", 3) == 1


def chosen(*arguments):
    parser = argparse.ArgumentParser()
    subject.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


MODEL = ("--transformers", "Qwen3VLTextModel", "--config", CONFIGS / "qwen3_vl_8b.json", "--layers", 1)


def test_a_transformers_class_at_full_width_without_weights(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert run(*MODEL, "--batch", 2, "--target", "gfx942", "--json", path) == 0
    found = report(path)
    assert len(found.fused) == 1
    facts = found.layers[0].reading
    assert (facts["num_heads"], facts["num_kv_heads"], facts["head_dim"]) == (32, 8, 128)
    assert facts["dtype"] == "torch.bfloat16"
    assert "none of them allocated" in capsys.readouterr().out


@pytest.mark.parametrize(("phase", "tokens"), [("decode", 1), ("prefill", 16)])
def test_a_phase_is_so_many_tokens(phase, tokens):
    built = subject.build(chosen(*MODEL, "--phase", phase, "--batch", 3, "--tokens", 16, "--dtype", "float16"))
    assert built.kwargs["input_ids"].shape == (3, tokens)
    assert built.kwargs["position_ids"].shape == (3, 3, tokens)
    assert {parameter.device.type for parameter in built.fn.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in built.fn.parameters()} == {torch.float16}


def test_a_multimodal_configuration_holds_the_text_models(tmp_path):
    text = json.loads((CONFIGS / "qwen3_vl_8b.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3_vl", "text_config": text}))
    from transformers import Qwen3VLTextModel

    assert subject._config(Qwen3VLTextModel, path).num_hidden_layers == 36


@pytest.mark.parametrize("name", ["qwen3_vl_8b", "qwen3_vl_235b_a22b"])
def test_the_examples_are_full_size(name):
    content = json.loads((CONFIGS / f"{name}.json").read_text())
    assert content["num_hidden_layers"] == {"qwen3_vl_8b": 36, "qwen3_vl_235b_a22b": 94}[name]
    assert content["rope_parameters"]["mrope_section"] == [24, 20, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name one model"),
        (("two_layers:good", "--transformers", "Qwen3VLTextModel"), "name one model"),
        (("two_layers",), "package.module:function"),
        (("no_such_module:f",), "cannot be imported"),
        (("no_such_file.py:f",), "there is no file"),
        (("two_layers:missing",), "has no function 'missing'"),
        (("two_layers:not_a_function",), "has no function 'not_a_function'"),
        (("two_layers:no_tuple",), "must return (model, args)"),
        (("--transformers", "Qwen9Model"), "no model class 'Qwen9Model'"),
        (("--transformers", "Qwen3VLTextModel", "--config", "none.json"), "cannot be read"),
        (("two_layers:good", "--target", "tpu"), "got 'tpu'"),
    ],
)
def test_what_cannot_be_built_says_what_to_ask_for(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_of_another_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert run("--transformers", "Qwen3VLTextModel", "--config", tmp_path / "config.json") == 2
    assert "is of model_type 'bert'" in capsys.readouterr().err


# --- what changed ---------------------------------------------------------------------------------------------------


def layer(state="rewritten", module=None, **more):
    kernel = "triton" if state == "rewritten" else None
    return LayerReport("qk_norm_rope_cache", state, kernel=kernel, module=module, **more)


def graph(*layers):
    return FusionReport(layers, stores=len(layers), nodes=1, kernel="auto", seconds={})


def kinds(before, after):
    return [(change.layer, change.kind) for change in compare(graph(*before), graph(*after))]


def test_equal_reports_have_no_difference():
    assert kinds([layer(module="a")], [layer(module="a")]) == []


@pytest.mark.parametrize("new", [layer("recognised", "a"), layer("declined", "a", code="norm.eps")])
def test_a_fusion_that_stopped_firing_is_lost(new):
    assert kinds([layer(module="a")], [new]) == [("a", "lost")]
    assert kinds([new], [layer(module="a")]) == [("a", "gained")]


def test_a_layer_that_is_gone_is_lost():
    assert kinds([layer(module="a"), layer(module="b")], [layer(module="b")]) == [("a", "lost")]


def test_layers_are_matched_by_module_not_by_order():
    assert kinds([layer(module="a"), layer("declined", "b", code="x")], [layer(module="a")]) == [("b", "moved")]
    assert kinds([layer(module="a")], [layer(module="c"), layer(module="a")]) == [("c", "gained")]


def test_layers_without_a_name_and_two_of_one_module():
    assert kinds([layer(), layer()], [layer(), layer("recognised")]) == [("layer 1", "lost")]
    assert kinds([layer(module="a"), layer(module="a")], [layer(module="a")]) == [("a #2", "lost")]


def test_facts_and_reasons_that_changed():
    old, new = layer(module="a", reading={"eps": 1e-6, "dim": 4}), layer(module="a", reading={"eps": 1e-5, "dim": 4})
    (change,) = compare(graph(old), graph(new))
    assert (change.kind, change.before, change.after) == ("reading", "eps 1e-06", "eps 1e-05")
    assert kinds([layer("declined", "a", code="x")], [layer("declined", "a", code="y")]) == [("a", "reason")]


def test_diff_as_a_command(tmp_path, capsys):
    paths = [tmp_path / "good.json", tmp_path / "bad.json"]
    contents = (graph(layer(module="a")), graph(layer("declined", "a", code="norm.eps", reason="why", source="m.py:3")))
    for path, content in zip(paths, contents, strict=True):
        path.write_text(explain._to_json(content, "a model", ()))
    assert run("--diff", *paths) == 1
    printed = capsys.readouterr().out
    assert "LOST" in printed and "norm.eps" in printed and "1 fusion lost" in printed
    assert run("--diff", *reversed(paths)) == 0
    assert "no fusion lost" in capsys.readouterr().out
    assert run("--diff", paths[0], paths[0]) == 0
    assert "nothing changed" in capsys.readouterr().out
    paths[0].write_text("{}")
    assert run("--diff", *paths) == 2
    assert "is not what `explain --json` writes" in capsys.readouterr().err
