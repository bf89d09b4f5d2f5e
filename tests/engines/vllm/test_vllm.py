"""The plug-in in the real vLLM, on a CPU: tiny random models in float32, against vLLM without it.

``make engines`` makes the environment; without it, these tests are skipped.
"""

from __future__ import annotations

import pytest
from engines.vllm.engine import PYTHON, Served, eager, serve

pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no engine at {PYTHON}: make engines"),
]

#: Of float32 logits through three layers that sum in another order; an exchanged operand gives more than 0.1.
LOGPROB = 1e-4

#: Of each model: how many layers store keys and values.
MODELS = {
    "qwen3": 3,
    "qwen3_moe": 3,
    "qwen3_vl": 3,
    "qwen3_vl_moe": 3,
    "llama": 3,
    "qwen2": 3,
    "gemma3": 3,
    "qwen3_next": 2,
}

#: On a CPU, linear attention is for bfloat16.
HALF = ("qwen3_next",)

LONG = [[(7 * i + j) % 900 + 5 for j in range(70)] + [20 + i] * (i + 3) for i in range(4)]


def agree(got: dict, wanted: dict) -> None:
    assert "error" not in got and "error" not in wanted, (got, wanted)
    assert got["tokens"] == wanted["tokens"]
    for ours, theirs in zip(got["logprobs"], wanted["logprobs"], strict=True):
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < LOGPROB


def fused(got: dict, layers: int) -> None:
    """Every layer stored in the fused call, and none left it to the backend."""
    assert len(got["seen"]) == layers
    for seen in got["seen"].values():
        assert seen["kernel"] == "reference" and seen["stores"] > 0 and seen["fallbacks"] == 0, seen


def near(got: dict, wanted: dict) -> None:
    """In bfloat16, with one rounding where vLLM takes three: the first token of each prompt, which has no history."""
    assert "error" not in got and "error" not in wanted, (got, wanted)
    for ours, theirs in zip(got["logprobs"], wanted["logprobs"], strict=True):
        assert abs(ours[0] - theirs[0]) < 0.1


def _model(name: str, **more) -> dict:
    return {"model": name, **({"image": True} if "_vl" in name else {}), **more}


# --- one model: what .ci/run runs -------------------------------------------------------------------------------------


@pytest.mark.engines_short
def test_one_model_in_pieces():
    """The backend of vLLM itself: pieces between attention, the store in them, one line at start."""
    spec = _model("qwen3", vllm_compile=True)
    with_it = serve(spec, switch="reference,require")
    (got,) = with_it.results
    agree(got, serve(eager(spec)).results[0])
    fused(got, 3)
    assert with_it.lines == ["3 of 3 layers fused (reference), Qwen3ForCausalLM"]
    assert "vllm::unified_kv_cache_update" not in got["splitting_ops"]
    assert "vllm::unified_attention_with_output" in got["splitting_ops"]


# --- every model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_model() -> tuple[dict[str, dict], dict[str, dict], Served]:
    specs = [_model(name, **({"engine": {"dtype": "bfloat16"}} if name in HALF else {})) for name in MODELS]
    with_it = serve(*specs, switch="reference")
    without = serve(*map(eager, specs))
    return dict(zip(MODELS, with_it.results, strict=True)), dict(zip(MODELS, without.results, strict=True)), with_it


@pytest.mark.parametrize("name", MODELS)
def test_model(every_model, name):
    got, wanted, _ = every_model
    (near if name in HALF else agree)(got[name], wanted[name])
    fused(got[name], MODELS[name])


def test_every_model_says_so(every_model):
    _, without, served = every_model
    assert [line.partition(" layers")[0] for line in served.lines] == [f"{n} of {n}" for n in MODELS.values()]
    assert not any(result["plugin"] for result in without.values()), "nothing is imported where it is off"


# --- what a server does -----------------------------------------------------------------------------------------------

_SMALL = {"block_size": 32, "max_num_seqs": 4}
FEATURES = {
    "chunked prefill": {"prompts": LONG, "engine": {"max_num_batched_tokens": 16, **_SMALL}},
    "prefix caching": {"prompts": [LONG[0], LONG[0], [*LONG[0][:64], 9, 8, 7]], "times": 2, "engine": _SMALL},
    "preemption": {
        "prompts": LONG,
        "tokens": 40,
        "engine": {"num_gpu_blocks_override": 10, "max_model_len": 160, **_SMALL},
    },
    "half precision": {"engine": {"dtype": "bfloat16"}},
    # The last one: it imports numba, after which no further engine starts in a process.
    "ngram": {
        "prompts": [[5, 6, 7, 8] * 6, [3, 1, 4, 1, 5, 9] * 4],
        "tokens": 24,
        "engine": {
            **_SMALL,
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        },
    },
}


@pytest.fixture(scope="module")
def features() -> dict[str, tuple[dict, dict]]:
    specs = [_model("qwen3", **spec) for spec in FEATURES.values()]
    got, wanted = serve(*specs, switch="reference"), serve(*map(eager, specs))
    return dict(zip(FEATURES, zip(got.results, wanted.results, strict=True), strict=True))


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "half precision"])
def test_feature(features, name):
    got, wanted = features[name]
    agree(got, wanted)
    fused(got, 3)
    assert name != "preemption" or min(got["preemptions"], wanted["preemptions"]) > 0


def test_half_precision(features):
    got, wanted = features["half precision"]
    near(got, wanted)
    fused(got, 3)


def test_tensor_parallel():
    spec = _model("qwen3", engine={"tensor_parallel_size": 2})
    with_it = serve(spec, switch="reference,require", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    without = serve(eager(spec), VLLM_ENABLE_V1_MULTIPROCESSING="1")
    agree(with_it.results[0], without.results[0])
    assert with_it.lines == ["3 of 3 layers fused (reference), Qwen3ForCausalLM"]


# --- other ways to compile, to ask, and to fail -----------------------------------------------------------------------

BY_NAME = {"inductor_passes": {"post_grad_custom_post_pass": "fx_fusion_vllm_pass.reference"}}
OTHERS = {
    "by configuration": {"compilation": BY_NAME},
    "fresh keys": {"compilation": BY_NAME, "change": "read_fresh_keys"},
    "one graph": {"compilation": {**BY_NAME, "splitting_ops": []}, "vllm_compile": True},
    "graph partition": {"compilation": {**BY_NAME, "use_inductor_graph_partition": True}, "vllm_compile": True},
    "unknown layout": {"compilation": BY_NAME, "change": "forget_the_layout"},
    "wrong layout": {"compilation": BY_NAME, "change": "exchange_views"},
    "sabotage": {"compilation": BY_NAME, "change": "exchange_k_and_v"},
    "nothing fused": {"compilation": BY_NAME, "change": "refuse_fusions"},
    "eager": {"compilation": BY_NAME, "engine": {"enforce_eager": True}},
    "lora": {"compilation": BY_NAME, "engine": {"enable_lora": True}},
}


@pytest.fixture(scope="module")
def others() -> tuple[dict[str, dict], dict, Served]:
    # A change of the plug-in from outside is not seen by the caches.
    off = {"VLLM_DISABLE_COMPILE_CACHE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    served = serve(*(_model("qwen3", **spec) for spec in OTHERS.values()), **off)
    return dict(zip(OTHERS, served.results, strict=True)), serve(eager(_model("qwen3"))).results[0], served


@pytest.mark.parametrize("name", ["by configuration", "fresh keys", "one graph", "graph partition"])
def test_way(others, name):
    got, wanted, _ = others
    assert got[name]["passes"] > 0
    agree(got[name], wanted)
    fused(got[name], 3)


@pytest.mark.parametrize("name", ["unknown layout", "wrong layout"])
def test_the_backend_stores_where_its_layout_is_not_known(others, name):
    got, wanted, served = others
    agree(got[name], wanted)
    assert all(seen["stores"] == 0 and seen["fallbacks"] > 0 for seen in got[name]["seen"].values())
    why = "which is not known" if name == "unknown layout" else "elsewhere than expected"
    assert sum("one call" in line and why in line for line in served.lines) == 1, "said once"


def test_exchanged_caches_are_seen(others):
    """The comparison can fail."""
    got, wanted, _ = others
    assert got["sabotage"]["tokens"] != wanted["tokens"]


def test_a_store_that_is_not_fused_is_put_back(others):
    got, wanted, served = others
    agree(got["nothing fused"], wanted)
    assert got["nothing fused"]["seen"] == {}
    assert any(line.startswith("0 of 3 layers fused, Qwen3ForCausalLM") for line in served.lines)
    assert "a test refuses every candidate" in served.log


@pytest.mark.parametrize("name", ["eager", "lora"])
def test_one_line_where_nothing_is_compiled(others, name):
    got, wanted, served = others
    agree(got[name], wanted)
    assert got[name]["mode"] == "NONE" and got[name]["seen"] == {}
    assert any("nothing is compiled" in line for line in served.lines)


def test_require_fails_the_start():
    """On a CPU, no fast kernel serves: ``auto`` fuses nothing."""
    served = serve(_model("qwen3"), switch="auto,require")
    assert "NotFused" in served.results[0]["error"]
    assert "0 of 3 layers fused" in served.results[0]["error"] and "contract.kernel" in served.results[0]["error"]


def test_a_wrong_switch_fails_the_start():
    served = serve(_model("qwen3", engine={"enforce_eager": True}), switch="fast")
    assert "FX_FUSION_VLLM: expected auto|triton|aiter|reference[,require], got 'fast'" in served.results[0]["error"]


@pytest.mark.parametrize("own", [False, True], ids=["inductor", "pieces"])
def test_a_warm_cache_has_the_operation_and_the_report(tmp_path, own):
    spec = _model("qwen3", vllm_compile=own)
    cold, warm = (serve(spec, switch="reference,require", cache=tmp_path) for _ in range(2))
    agree(warm.results[0], cold.results[0])
    fused(warm.results[0], 3)
    assert cold.results[0]["passes"] > 0 and warm.results[0]["passes"] == 0
    assert cold.lines == warm.lines == ["3 of 3 layers fused (reference), Qwen3ForCausalLM"]
    told = [sum("rewritten by reference" in report for report in run.results[0]["reports"]) for run in (cold, warm)]
    assert min(told) > 0
