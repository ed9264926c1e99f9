# On a machine that has only Python (3.11 to 3.13): `make quickstart` runs a job on the bundled model, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip --disable-pip-version-check
PYTEST = $(VENV)/bin/python -m pytest -n 2
# test-aot: the compilers of NVIDIA GPUs and TPUs, which need no device, in a virtual environment for each version of jax. The newer needs Python 3.12.
PYTHON312 ?= $(shell for python in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python; do \
	"$$python" -c "" 2>/dev/null && echo "$$python" && break; done)
TORCH ?= torch==2.13.0 # a build without CUDA serves: torch is only an oracle here

.PHONY: setup quickstart lint test test-slow test-oracle test-aot notebooks docs docs-commands clean

setup: $(VENV)/.installed

quickstart: setup
	$(VENV)/bin/tpllm run configs/jobs/quickstart.yaml

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not oracle and not aot"

test-slow: $(VENV)/.test
	$(PYTEST) -m "slow and not oracle and not aot"

test-oracle: $(VENV)/.oracle
	$(PYTEST) -m oracle

test-aot: .venv-aot-0.10/.installed $(if $(PYTHON312),.venv-aot-0.11/.installed)
	$(if $(PYTHON312),,@echo "test-aot: no Python 3.12 found, so jax 0.11 is not tried")
	$(MAKE) -j 2 -O test-aot-0.10 $(if $(PYTHON312),test-aot-0.11)

test-aot-%: .venv-aot-%/.installed
	.venv-aot-$*/bin/python -m pytest -m aot tests/aot

notebooks: $(VENV)/.notebooks
	$(VENV)/bin/python tools/run_notebooks.py

docs: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx -q -n -W --keep-going docs build/docs

docs-commands: $(VENV)/.docs
	$(VENV)/bin/python tools/run_docs.py

clean:
	rm -rf $(VENV) .venv-aot-0.10 .venv-aot-0.11 build out *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -e .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install -q -e ".[test]"
	touch $@

$(VENV)/.oracle: $(VENV)/.test
	$(PIP) install -q $(TORCH)
	$(PIP) install -q -e ".[test,oracle]"
	touch $@

.venv-aot-0.10/.installed: AOT_PYTHON = $(PYTHON)
.venv-aot-0.10/.installed: JAX_VERSION = 0.10.2
.venv-aot-0.10/.installed: LIBTPU_VERSION = 0.0.42
.venv-aot-0.11/.installed: AOT_PYTHON = $(PYTHON312)
.venv-aot-0.11/.installed: JAX_VERSION = 0.11.2
.venv-aot-0.11/.installed: LIBTPU_VERSION = 0.0.48
.venv-aot-%/.installed: pyproject.toml
	$(AOT_PYTHON) -m venv .venv-aot-$*
	.venv-aot-$*/bin/pip --disable-pip-version-check install -q -e . "pytest>=8" "jax==$(JAX_VERSION)" "libtpu==$(LIBTPU_VERSION).*"
	.venv-aot-$*/bin/pip --disable-pip-version-check install -q --no-deps "jax-cuda13-pjrt==$(JAX_VERSION)" "jax-cuda13-plugin==$(JAX_VERSION)" \
		nvidia-cuda-nvcc nvidia-nvvm
	touch $@

$(VENV)/.notebooks: $(VENV)/.test
	$(PIP) install -q -e ".[test,notebooks]"
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(PIP) install -q -e ".[test,docs]"
	touch $@
