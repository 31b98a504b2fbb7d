# Every target makes .venv and installs what it needs; the first run downloads torch and takes minutes, later ones
# start at once. Needs Python >= 3.11 with venv, git and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# Prerequisites of the stamps: what pip reads to decide what to install.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

# Tests start many processes, and each would compile the package, pytest's own also the tests: `make clean` removes
# what is written.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
# A venv that broke half-way (no ensurepip on Debian, say) must not look finished to the next run.
.DELETE_ON_ERROR:
.PHONY: help demo dense notebooks test test-long bench lint format types package clean

help: ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '  PYTHON=... chooses the interpreter for %s (make clean first), ARGS=... goes to pytest.\n' '$(VENV)'

demo: $(INSTALLED) ## Prune the embedded digits model on this device and compare it with the dense one
	$(BIN)/lightning-prune compare --config configs/digits.yaml --controls false --output results/digits

dense: $(INSTALLED) ## Train a dense head on the embedded digits and compare it dense with pruned (IoU; minutes)
	$(BIN)/python examples/segment_digits.py --output results/segment_digits $(ARGS)

# Without --overwrite nbmake leaves the files, and with them the committed outputs, as they are. One after another, as
# they measure.
notebooks: $(INSTALLED_DEV) ## Execute the notebooks of examples/notebooks and fail where a cell does (minutes)
	$(BIN)/pytest --nbmake --nbmake-timeout 600 --timeout 900 -n 0 examples/notebooks $(ARGS)

test: $(INSTALLED_DEV) ## Run the tests, a process for each core (ARGS="-k schedule -n 0" goes to pytest)
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

test-long: $(INSTALLED_DEV) ## Run the longer tests, which are not part of `make test`
	$(BIN)/pytest -n auto --dist load -m long $(ARGS)

bench: $(INSTALLED) ## Run all benchmarks on this device: an hour, with nothing else running (ARGS=--quick: minutes)
	$(BIN)/python examples/benchmarks/all.py --output results/benchmarks $(ARGS)

lint: $(INSTALLED_DEV) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED_DEV) ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED_DEV) ## Check the types
	$(BIN)/mypy

# The wheel is built from the sdist, which proves the sdist whole. An old SOURCES.txt would add what MANIFEST.in no
# longer names.
package: $(INSTALLED_DEV) ## Build sdist and wheel into dist/
	rm -rf dist build lightning_prune.egg-info/SOURCES.txt
	$(BIN)/python -m build

clean: ## Remove the environment, caches and build products (results/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find lightning_prune tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $(INSTALLED) $@
