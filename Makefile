# Everything a developer or a first-time user runs. Each target sets up what it needs.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint bench gpu-check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | column -t -s ':'

# Build tools first: the package is built against the torch that it will run with.
$(READY): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(READY)  ## train a small LLaVA with and without PRe on real images (about 10 minutes)
	$(BIN)/prereg train --preset scenes

test: $(READY)  ## the tests
	$(BIN)/python -m pytest -n 2

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## the benchmarks on this machine; prints a table, writes benchmarks/results/
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-json=benchmarks/results/cpu_loss.json
	$(BIN)/python benchmarks/table.py benchmarks/results/cpu_loss.json

# On a GPU machine the system python has torch and triton already: no virtual environment there.
gpu-check:  ## the GPU tests; says so where there is no GPU
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then \
	    PYTHONPATH=. $(PYTHON) -m pytest tests/gpu; \
	else echo "gpu-check: no GPU on this machine, nothing was run"; fi

clean:  ## remove the environment, build products and caches (not runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
