"""The page of a report: what stands in it, and what a browser makes of it, on a desk and on a phone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
import two_layers

import fx_fusion
from fx_fusion.reporting.anatomy import Recorder
from fx_fusion.reporting.html import page
from fx_fusion.trace import explain_to

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("FX_FUSION_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def explained():
    """The report of three layers of which one declines, and what was recorded of them."""
    recorder = Recorder()
    model, args = two_layers.clamped()
    report = explain_to(recorder, model, args, {}, fx_fusion.Config(kernel="reference"))
    return report, recorder.graphs


@pytest.fixture(scope="module")
def html(explained):
    report, graphs = explained
    return page(report, graphs, "a <model> & more", ("target gfx942",))


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_every_part_of_the_region_is_recorded(explained):
    _, (graph,) = explained
    good, bad = graph.layers
    assert good.layers == (0, 2)
    roles = {(step.role, step.branch) for step in good.before}
    wanted = {("data", "")} | {(role, branch) for role in ("split", "norm", "rope", "store") for branch in "qk"}
    assert roles >= wanted - {("store", "q")} | {("split", "v"), ("store", "v"), ("lookup", ""), ("operand", "")}
    findings = {step.label or step.name: step.finding for step in good.before if step.finding}
    assert "q = columns 0..63, 4 heads of 16" in findings["mm"]
    assert "mRoPE [4, 2, 2] interleaved" in findings["positions"]
    assert "eps 1e-06" in findings["self.layers.0.q_weight"]
    assert [step.role for step in good.after].count("call") == 1
    assert graph.nodes_after < graph.nodes_before == sum(count for _, count in graph.roles_before)
    assert bad.layers == (1,)


def test_each_node_has_one_part_and_the_right_one(explained):
    _, (graph,) = explained
    steps = {step.name: step for step in graph.layers[0].before}
    assert len(steps) == len(graph.layers[0].before)
    for step in steps.values():
        if step.op.startswith(("rsqrt", "mean", "pow")):
            assert step.role == "norm", step
        if step.op.startswith(("sub", "cat")):
            assert step.role == "rope", step
        if step.op.startswith("index_put"):
            assert step.role == "store", step


def test_a_declined_layer_quotes_the_line_at_fault(explained):
    _, (graph,) = explained
    bad = graph.layers[1]
    (fault,) = [step for step in bad.before if step.role == "offending"]
    assert "clamp" in fault.op and "clamp" in fault.finding
    assert "clamp(-8, 8)" in bad.quote.lines[bad.quote.line - bad.quote.first]
    assert bad.after == ()


def test_a_compilation_records_nothing(monkeypatch):
    """The graphs are an observer's business: none is asked for in a compilation."""
    monkeypatch.setattr(Recorder, "starts", lambda self, graph: pytest.fail("recorded"))
    model, args = two_layers.shorter()
    fx_fusion.explain(model, *args)


# --- what stands in the page ----------------------------------------------------------------------------------------


def test_nothing_is_loaded_and_everything_escaped(html):
    assert "a &lt;model&gt; &amp; more" in html and "<model>" not in html
    assert not re.search(r"(src|href)=[\"'](?!#)|url\((?!#)|@import|<script", html)


def test_the_page_tells_what_happened(html):
    for words in (
        "2 of 3",
        "2 layers alike: 0, 2",
        "proof.not_analytic",
        "two_layers.py:11",
        "clamp(-8, 8)",
        "one call",
    ):
        assert words in html, words


def test_links_lead_to_nodes(html):
    targets = set(re.findall(r'href="#([^"]+)"', html))
    assert targets
    assert targets <= set(re.findall(r'id="([^"]+)"', html))


def test_a_report_without_a_layer_is_a_page_too():
    recorder = Recorder()
    report = explain_to(recorder, lambda x: x * 2, (two_layers.arguments()[0],), {}, fx_fusion.Config())
    assert "store.missing" in page(report, recorder.graphs, "nothing", ())


# --- in a browser ---------------------------------------------------------------------------------------------------

#: Measures the page in a frame of the width of a device, and leaves what it found in its own document.
HARNESS = """<!doctype html><iframe id="page" src="page.html" style="width:{width}px;height:1200px;border:0"></iframe>
<pre id="found"></pre><script>
document.getElementById("page").onload = event => {{
  const inner = event.target.contentDocument, all = name => [...inner.querySelectorAll(name)];
  const style = (name, what) => event.target.contentWindow.getComputedStyle(inner.querySelector(name))[what];
  all("details").forEach(each => each.open = true);
  document.getElementById("found").textContent = JSON.stringify({{
    overflow: inner.documentElement.scrollWidth - inner.documentElement.clientWidth,
    steps: all("li").filter(each => each.getBoundingClientRect().height > 10).length,
    drawings: all("figure svg").map(each => Math.round(each.getBoundingClientRect().width)),
    columns: style(".flows", "gridTemplateColumns").split(" ").length,
    roles: ["split", "norm", "rope", "store"].map(role => style("li." + role, "borderLeftColor")),
    fault: style("pre b", "backgroundColor"),
    paper: style("body", "backgroundColor"),
    small: Math.min(...["p", "dd", "li"].map(name => parseFloat(style(name, "fontSize")))),
  }});
}};
</script>"""


def look(folder, width, *flags):
    (folder / "harness.html").write_text(HARNESS.format(width=width))
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000",
        *flags, "--dump-dom", (folder / "harness.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert found, f"{BROWSER} left no measurement: exit code {done.returncode}\n{done.stderr[-2000:]}"
    return json.loads(found[1])


@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
def test_in_a_browser_on_a_desk_and_on_a_phone(html, tmp_path):
    (tmp_path / "page.html").write_text(html)
    desk, phone = look(tmp_path, 1280), look(tmp_path, 360, "--blink-settings=preferredColorScheme=0")
    assert desk["overflow"] == phone["overflow"] == 0, "the page scrolls sideways"
    assert desk["steps"] == phone["steps"] == html.count("<li ")
    assert (desk["columns"], phone["columns"]) == (2, 1), "before and after stand side by side only where there is room"
    assert all(280 <= width <= 360 for width in phone["drawings"]) and len(phone["drawings"]) == 2
    assert len(set(desk["roles"])) == 4, "each part has its colour"
    assert desk["fault"] != "rgba(0, 0, 0, 0)"
    assert desk["paper"] != phone["paper"], "light here, dark there"
    assert phone["small"] >= 12, "letters that a phone can show"
