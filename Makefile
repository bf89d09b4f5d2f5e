# make demo: install and run the main job on this machine's device.   make test: install and run the tests.
# make amd-acceptance: on a ROCm machine, everything that it can tell, in one report.
# make engines: the tests with the real vLLM on a CPU, in an environment of its own (2 GB, under build/engines or where
# ENGINE_WORK says); ENGINES=engines_short for a few minutes of them.
# A torch that is already installed (ROCm, CUDA) is used, never replaced; without one, the pinned CPU build is installed.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TORCH := 2.13.0
TRITON := 3.6.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# An environment that is made from another sees that one's packages by this path only.
SITE := 'import sysconfig; print(sysconfig.get_path("purelib"))'

.PHONY: setup demo test lint docs site package coverage engines amd-acceptance clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@if $(RUN) -c 'import torch' 2>/dev/null; then \
		echo "updating $(VENV)"; \
	elif $(PYTHON) -c 'import torch' 2>/dev/null; then \
		echo "using the torch of $(PYTHON)"; \
		$(PYTHON) -m venv --system-site-packages $(VENV) && \
		$(PYTHON) -c $(SITE) > `$(RUN) -c $(SITE)`/outer.pth; \
	else \
		echo "installing the CPU build of torch $(TORCH)"; \
		$(PYTHON) -m venv $(VENV) && \
		$(RUN) -m pip install --quiet --retries 1 --extra-index-url $(TORCH_CPU_INDEX) torch==$(TORCH); \
	fi
	@$(RUN) -c 'import torch; print(f"torch=={torch.__version__}")' > $(VENV)/constraints.txt
	@# A GPU build of torch brings its Triton. The tests of the AMD machine code know what this one emits.
	@$(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install --quiet triton==$(TRITON)
	$(RUN) -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[test,lint,demo]'
	@touch $@

demo: setup
	$(RUN) examples/demo.py

test: setup
	$(RUN) -m pytest -n 2

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

docs: setup
	$(RUN) -c "from fx_fusion.decline import markdown; print(markdown(), end='')" > docs/declines.md
	$(RUN) -c "from fx_fusion.graph_capture.hazards import markdown; print(markdown(), end='')" > docs/hazards.md

site: setup
	@$(RUN) -c 'import material, mkdocstrings' 2>/dev/null || \
		$(RUN) -m pip install --quiet --constraint $(VENV)/constraints.txt '.[docs]'
	$(RUN) docs/site.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict
	@echo "build/site/index.html"

package: setup
	PYTHON=$(RUN) tests/packaging.sh

coverage: setup
	$(RUN) tests/coverage_table.py

ENGINE_WORK ?= $(CURDIR)/build/engines
ENGINES ?= engines
VLLM := $(ENGINE_WORK)/vllm
VLLM_REQUIREMENTS := tests/engines/vllm/requirements.txt

engines: setup $(VLLM)/.installed
	ENGINE_WORK=$(ENGINE_WORK) $(RUN) -m pytest tests/engines -m $(ENGINES)

# The wheel's pins are for another torchvision: everything is installed by itself, as it is listed.
$(VLLM)/.installed: $(VLLM_REQUIREMENTS) pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --upgrade 'setuptools>=77,<82'
	$(VLLM)/bin/python -m pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_CPU_INDEX) torch==$(TORCH)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement $(VLLM_REQUIREMENTS)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@# This torchvision describes operations that its build for this torch lacks.
	@$(VLLM)/bin/python -c $(SITE) | xargs -I{} sh -c ': > {}/torchvision/_meta_registrations.py'
	@touch $@

amd-acceptance: setup
	$(RUN) tests/acceptance.py

clean:
	rm -rf $(VENV) build dist *.egg-info
