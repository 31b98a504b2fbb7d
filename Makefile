# Every target makes .venv and installs what it needs; the first run downloads torch and takes minutes, later ones
# start at once. Needs Python >= 3.11 with venv, git and make.

PYTHON ?= python3
# A file of constraints for pip, such as .ci/oldest.txt; what it gives is installed into an environment of its own.
CONSTRAINTS ?=
VENV ?= .venv$(addprefix -,$(basename $(notdir $(CONSTRAINTS))))
BIN := $(VENV)/bin
ARGS ?=

# Prerequisites of the stamps: what pip reads to decide what to install.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DOCS := $(VENV)/.installed-docs

# Tests start many processes, and each would compile the package, pytest's own also the tests: `make clean` removes
# what is written.
unexport PYTHONDONTWRITEBYTECODE

ifneq ($(CONSTRAINTS),)
export PIP_CONSTRAINT := $(abspath $(CONSTRAINTS))
endif

.DEFAULT_GOAL := help
# A venv that broke half-way (no ensurepip on Debian, say) must not look finished to the next run.
.DELETE_ON_ERROR:
.PHONY: help demo dense notebooks test test-long bench install lint format types docs workflows oldest package clean

help: ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '  PYTHON=... chooses the interpreter for %s (make clean first), ARGS=... goes to pytest,\n' '$(VENV)'
	@printf '  CONSTRAINTS=.ci/oldest.txt installs the oldest supported torch, into .venv-oldest.\n'

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

install: $(INSTALLED_DEV) ## Install the package and the tools for work on it into .venv

lint: $(INSTALLED_DEV) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED_DEV) ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED_DEV) ## Check the types
	$(BIN)/mypy

docs: $(INSTALLED_DOCS) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The schemas come with check-jsonschema: nothing is downloaded.
SCHEMA := $(BIN)/check-jsonschema --builtin-schema

workflows: $(INSTALLED_DEV) ## Check the files of .github, and CITATION.cff, against their schemas
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.citation-file-format CITATION.cff

oldest: $(INSTALLED_DEV) ## Write .ci/oldest.txt from the lower bounds in pyproject.toml
	$(BIN)/python .ci/oldest.py > .ci/oldest.txt.new
	mv .ci/oldest.txt.new .ci/oldest.txt

# The wheel is built from the sdist, which proves the sdist whole. An old SOURCES.txt would add what MANIFEST.in no
# longer names.
package: $(INSTALLED_DEV) ## Build sdist and wheel into dist/
	rm -rf dist build lightning_prune.egg-info/SOURCES.txt
	$(BIN)/python -m build

clean: ## Remove the environments, caches and build products (results/ stays)
	rm -rf $(VENV) .venv .venv-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find lightning_prune tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(INSTALLED_DEV): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $(INSTALLED) $@

$(INSTALLED_DOCS): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[docs]'
	@touch $(INSTALLED) $@
