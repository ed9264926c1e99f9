# On a machine that has only Python (3.11 to 3.13): `make quickstart` runs a job on the bundled model, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip --disable-pip-version-check
PYTEST = $(VENV)/bin/python -m pytest -n 2
TORCH ?= torch==2.13.0 # a build without CUDA serves: torch is only an oracle here

.PHONY: setup quickstart lint test test-slow test-oracle notebooks clean

setup: $(VENV)/.installed

quickstart: setup
	$(VENV)/bin/tpllm run configs/jobs/quickstart.yaml

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not oracle"

test-slow: $(VENV)/.test
	$(PYTEST) -m "slow and not oracle"

test-oracle: $(VENV)/.oracle
	$(PYTEST) -m oracle

notebooks: $(VENV)/.notebooks
	$(VENV)/bin/python tools/run_notebooks.py

clean:
	rm -rf $(VENV) build out *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

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

$(VENV)/.notebooks: $(VENV)/.test
	$(PIP) install -q -e ".[test,notebooks]"
	touch $@
