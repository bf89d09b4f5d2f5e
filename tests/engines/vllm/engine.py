"""Start the real engine in its own environment, and read what it generated."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
#: Where ``make engines`` puts the environment, models and caches.
WORK = Path(os.environ.get("ENGINE_WORK") or ROOT / "build" / "engines")
PYTHON = WORK / "vllm" / "bin" / "python"

_SECONDS = 1500


@dataclass(frozen=True)
class Served:
    """What one process printed: a result for each start of the engine, and the log."""

    results: list[dict]
    log: str

    @property
    def lines(self) -> list[str]:
        """What the plug-in said."""
        return [line.partition("fx_fusion: ")[2] for line in self.log.splitlines() if " fx_fusion: " in line]


@functools.cache
def models() -> Path:
    """The folder of the tiny models, written anew where their source has changed."""
    folder = WORK / "models"
    source = (HERE / "tiny_models.py").read_text()
    stamp = folder / "source.txt"
    if not stamp.exists() or stamp.read_text() != source:
        names = subprocess.run(
            [PYTHON, "-c", "import tiny_models; print(*tiny_models.MODELS)"],
            cwd=HERE, check=True, capture_output=True, text=True, env=environment(),
        ).stdout.split()  # fmt: skip
        subprocess.run(
            [PYTHON, HERE / "tiny_models.py", folder, *names],
            check=True,
            env=environment(),
            timeout=_SECONDS,
        )
        stamp.write_text(source)
    return folder


def environment(switch: str | None = None, cache: Path | None = None) -> dict[str, str]:
    """Nothing of the test run's own caches and switches; the engine's are kept from one run to the next."""
    cache = cache or WORK / "cache"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FX_FUSION", "TORCHINDUCTOR"))}
    own = {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    return {**kept, **own, **({"FX_FUSION_VLLM": switch} if switch else {})}


def serve(*specs: dict, switch: str | None = None, cache: Path | None = None, **more: str) -> Served:
    """One process in which the engine is started for each of `specs`: see ``serve.py``.

    Args:
        switch: ``FX_FUSION_VLLM``; None for vLLM as it comes.
        cache: where vLLM and Inductor keep what they compiled.
        more: further environment variables.
    """
    given = json.dumps([{"folder": str(models()), **spec} for spec in specs])
    variables = {**environment(switch, cache), **more}
    done = subprocess.run(
        [PYTHON, HERE / "serve.py", given], capture_output=True, text=True, timeout=_SECONDS, env=variables
    )
    log = done.stdout + done.stderr
    results = [json.loads(line.removeprefix("RESULT ")) for line in log.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(specs), log[-4000:]
    return Served(results, log)


def eager(spec: dict) -> dict:
    """The same start, nothing compiled: what vLLM computes without the plug-in."""
    rest = {key: value for key, value in spec.items() if key not in ("compilation", "vllm_compile", "change")}
    return {**rest, "engine": {**spec.get("engine", {}), "enforce_eager": True}}
