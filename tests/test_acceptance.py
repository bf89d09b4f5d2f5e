"""The report for the first person with an AMD GPU, as far as it can be tested without any."""

from __future__ import annotations

import sys

import acceptance
import pytest
import torch
from acceptance import Outcome, Step


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["acceptance.py", "--output", str(tmp_path / "out")])
    assert acceptance.main() == 2
    assert "neither a ROCm nor a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'one is not two'\n"
        "def test_absent(): pytest.skip('no such device')\n"
    )
    return path


@pytest.mark.slow
def test_a_run_of_tests_is_counted_with_its_reasons(suite, tmp_path):
    step = Step("some tests", (sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", str(suite)), tests=True)
    outcome = acceptance.run(step, tmp_path)
    assert outcome.returncode == 1
    assert outcome.summary == "1 passed, 1 failed, 1 skipped"
    assert "one is not two" in outcome.details
    assert "no such device" in outcome.details


def test_a_step_that_fails_shows_its_last_words(tmp_path):
    step = Step("a script", (sys.executable, "-c", "import sys; print('last words'); sys.exit(3)"))
    outcome = acceptance.run(step, tmp_path)
    assert (outcome.returncode, outcome.summary) == (3, "failed")
    assert "last words" in outcome.details


def test_a_file_that_a_step_wrote_is_in_the_report(tmp_path):
    command = (sys.executable, "-c", f"open({str(tmp_path / 'table.md')!r}, 'w').write('| a table |')")
    outcome = acceptance.run(Step("a benchmark", command, shows="table.md"), tmp_path)
    assert "| a table |" in acceptance.report({"HIP": "6.4"}, [outcome])


def test_the_report_says_whose_device_it_was():
    outcome = Outcome(Step("a step", ("true",)), 0, 1.0, "passed", "")
    assert acceptance.report({"HIP": "6.4"}, [outcome]).startswith("# AMD acceptance\n")
    assert "no AMD device is present" in acceptance.report({"HIP": "none"}, [outcome]).splitlines()[0]


def test_every_file_that_it_runs_exists(tmp_path):
    for step in acceptance.steps(tmp_path):
        for argument in step.command:
            if argument.startswith(("tests/", "examples/")):
                assert (acceptance.ROOT / argument).exists(), argument
