# Every target works on a fresh clone: what it needs is installed into .venv first. Another interpreter: make PYTHON=python3.12 …
PYTHON ?= python3
TEST_WORKERS ?= 2

BIN := .venv/bin
# Python compiles a module when it is first imported; most of what is installed never is.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
# Written after a successful installation only, so that an interrupted one is done again.
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help train test lint format typecheck coverage bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

train: $(INSTALLED) ## train the default agent; the results go to artifacts/
	$(BIN)/hardy train configs/config_train.yaml

test: lint typecheck ## everything that must pass: lint, types, tests, coverage
	$(BIN)/pytest -q -n $(TEST_WORKERS) --dist worksteal --cov --cov-fail-under=90

lint: $(INSTALLED_DEV) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED_DEV) ## correct style and formatting where that can be done automatically
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(INSTALLED_DEV) ## check the types
	$(BIN)/mypy

coverage: $(INSTALLED_DEV) ## run the tests and show line by line what they reach, in htmlcov/
	$(BIN)/pytest -q -n $(TEST_WORKERS) --cov --cov-report=html --trace-every-case

bench: $(INSTALLED) ## measure speed and memory, and training beside other libraries, which go into their own .venv-bench
	$(BIN)/python -m benchmarks

clean: ## remove environments, caches and builds; artifacts/ stays
	rm -rf .venv .venv-bench src/hardy/*.so build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

# What the compiled library is built from: a change installs anew.
KERNEL := setup.py $(wildcard src/hardy/*.h src/hardy/*/*.cpp src/hardy/*/*.h)

define ENVIRONMENT
	@command -v $(PYTHON) >/dev/null || { echo "Hardy needs Python 3.11 or newer, and $(PYTHON) is not there: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Hardy needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.11" % v[:2])'
	@echo "Installing Hardy into .venv (takes a few minutes the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
endef

$(INSTALLED): pyproject.toml constraints.txt $(KERNEL)
	$(ENVIRONMENT)
	@$(INSTALL) -e .
	@touch $@

# Not by way of the other: that would build the compiled library twice.
$(INSTALLED_DEV): pyproject.toml constraints.txt $(KERNEL)
	$(ENVIRONMENT)
	@$(INSTALL) -e '.[dev]'
	@touch $(INSTALLED) $@
