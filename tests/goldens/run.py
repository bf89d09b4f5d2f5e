"""Write what the pass does with every subject, or check that it still does the same.

python tests/goldens/run.py --write tests/goldens/digests.json
python tests/goldens/run.py --check tests/goldens/digests.json --against FOLDER --only 'corpus/*' --jobs 2

The digests are of texts, which go into a folder of their own (``--texts``). With the folder of an earlier run
(``--against``) a subject that differs is shown as a diff.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIGESTS = Path(__file__).with_name("digests.json")
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

#: A diff longer than this is cut.
MOST_LINES = 120


def environment() -> dict[str, str]:
    """Of what the graphs depend on besides the package."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "triton")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--write", type=Path, metavar="FILE", help="write the digests; with --only, those of it")
    task.add_argument("--check", type=Path, metavar="FILE", help="compare with these digests")
    task.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--only", action="append", metavar="GLOB", help="subjects by name; may be repeated")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--texts", type=Path, default=ROOT / "build" / "goldens", help="where the texts are written")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="texts of an earlier run, to show a diff")
    given = parser.parse_args()
    names = chosen(given.only)
    if given.list:
        print("\n".join(names))
        return 0
    started = time.perf_counter()
    texts = dict(snapshots(names, given.jobs))
    for name, content in texts.items():
        path = given.texts / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    failed = write(given.write, texts, given.only) if given.write else check(given.check, texts, given.against)
    print(f"{len(texts)} subjects, {time.perf_counter() - started:.0f} s")
    return int(failed)


def chosen(globs: Sequence[str] | None) -> list[str]:
    from goldens.subjects import subjects

    names = [subject.name for subject in subjects()]
    found = [name for name in names if globs is None or any(fnmatchcase(name, glob) for glob in globs)]
    if not found:
        raise SystemExit(f"no subject is named {globs}")
    return found


def snapshots(names: Sequence[str], jobs: int) -> Iterator[tuple[str, str]]:
    """Each subject's text. What one raises is its text too: others go on."""
    if jobs == 1:
        prepare()
        yield from map(snapshot, names)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), prepare) as pool:
        yield from pool.map(snapshot, names, chunksize=4)


def prepare() -> None:
    """One thread, no compile cache but a fresh one, and no options from outside."""
    import torch

    for name in ("FX_FUSION_KERNEL", "FX_FUSION_DISABLE", "FX_FUSION_FUEL", "FX_FUSION_TUNED"):
        os.environ.pop(name, None)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="goldens")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def snapshot(name: str) -> tuple[str, str]:
    from goldens.snapshot import text
    from goldens.subjects import subjects

    (subject,) = (each for each in subjects() if each.name == name)
    try:
        return name, text(subject)
    except Exception as error:
        traceback.print_exc()
        return name, f"crashed: {type(error).__name__}: {str(error).splitlines()[:1]}\n"


def write(path: Path, texts: dict[str, str], only: Sequence[str] | None) -> bool:
    from goldens.snapshot import digest

    kept = json.loads(path.read_text())["digests"] if only and path.exists() else {}
    digests = {**kept, **{name: digest(content) for name, content in texts.items()}}
    content = {"environment": environment(), "digests": dict(sorted(digests.items()))}
    path.write_text(json.dumps(content, indent=1) + "\n")
    crashed = [name for name, content in texts.items() if content.startswith("crashed")]
    print("".join(f"{name} crashed\n" for name in crashed), end="")
    return bool(crashed)


def check(path: Path, texts: dict[str, str], against: Path | None) -> bool:
    from goldens.snapshot import digest

    golden = json.loads(path.read_text())
    if golden["environment"] != environment():
        print(f"note: the digests were written with {golden['environment']}, here is {environment()}")
    differing = [name for name, content in texts.items() if golden["digests"].get(name) != digest(content)]
    for name in differing:
        print(f"{name} differs" if name in golden["digests"] else f"{name} is new")
        show(name, texts[name], against)
    print(f"{len(differing)} of {len(texts)} differ")
    return bool(differing)


def show(name: str, content: str, against: Path | None) -> None:
    old = against / f"{name}.txt" if against else None
    if old is None or not old.exists():
        return
    lines = [*difflib.unified_diff(old.read_text().splitlines(), content.splitlines(), "before", "now", lineterm="")]
    print("\n".join(lines[:MOST_LINES]))
    if len(lines) > MOST_LINES:
        print(f"… {len(lines) - MOST_LINES} further lines")


if __name__ == "__main__":
    sys.exit(main())
