#!/usr/bin/env bash
# What people install: the sdist, the wheel made of it, in an environment of its own, away from the sources.
# torch and the other dependencies are those of $PYTHON's environment: none is downloaded.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
PYTHON="${PYTHON:-$root/.venv/bin/python}"
case "$PYTHON" in /*) ;; *) PYTHON="$root/$PYTHON" ;; esac
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"

"$PYTHON" -c 'import build' 2>/dev/null || "$PYTHON" -m pip install --quiet build
# A copy, so that what an earlier build left behind cannot end up in the package.
git -C "$root" ls-files -z | tar --null -C "$root" -T - -cf - | tar -xf - -C "$(mkdir -p "$work/source" && echo "$work/source")"
"$PYTHON" -m build --quiet --no-isolation --outdir "$work/dist" "$work/source"
"$PYTHON" -m venv --without-pip "$work/clean"
"$PYTHON" - "$work/clean" <<'PY'
"""Lets the clean environment see the packages of this one, but for the project itself, which is installed editable."""
import pathlib, sys, sysconfig
site = next(pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"))
shared = pathlib.Path(sys.argv[1]) / "shared"
shared.mkdir()
for entry in pathlib.Path(sysconfig.get_paths()["purelib"]).iterdir():
    if not entry.name.startswith(("__editable__", "fx_fusion")):
        (shared / entry.name).symlink_to(entry)
(site / "shared.pth").write_text(f"{shared}\n")
PY
"$PYTHON" -m pip --python "$work/clean/bin/python" install --quiet --no-deps --no-index "$work"/dist/*.whl
"$work/clean/bin/python" -I "$root/tests/packaged.py" "$work"
