# StreamForge. `make` lists what there is. Needs python3 (3.11 to 3.13) and the package registries, nothing else.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# uv from the PATH, or from PyPI into a private environment; nothing is installed into the system.
PYTHON ?= python3
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := $(UV) run --no-sync
# A Python of this machine, never one from elsewhere.
export UV_PYTHON_DOWNLOADS := never

# What is there already is left alone, so that `make demo` does not take away what `make test` needs.
SYNC := $(UV) sync --frozen --inexact

.PHONY: help install install-dev install-all demo test up down status lint format bench screenshots clean

help: ## List every target with what it does.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(filter .uv/bin/uv,$(UV)) ## Install what the platform needs from the lock file into .venv; ML=1: models too.
	$(SYNC) --no-group dev $(if $(ML),--group ml)

install-dev: $(filter .uv/bin/uv,$(UV)) ## Install what the platform and the linters need.
	$(SYNC)

install-all: $(filter .uv/bin/uv,$(UV)) ## Install everything: models, linters, tests.
	$(SYNC) --all-groups

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'

demo: install ## Market in, Iceberg tables out: run the whole line once, verify it, print a report; ML=1: a model and the marts too.
	$(RUN) streamforge demo $(if $(ML),--models) $(if $(RECORDINGS),--recordings $(RECORDINGS)) $(DEMO_ARGS)

test: install-all ## Run the whole test suite on the real parts.
	$(RUN) pytest -n 3 --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

up: install ## Start the platform and keep it running until Ctrl-C.
	$(RUN) streamforge up

down: install ## Stop whatever of the platform was left running.
	$(RUN) streamforge down

status: install ## Show every process of the platform, its position and lag.
	$(RUN) streamforge status

lint: install-dev ## Check formatting, rules, types and the direction of imports.
	$(RUN) ruff format --check
	$(RUN) ruff check
	$(RUN) mypy
	$(RUN) lint-imports

format: install-dev ## Format the code and repair what the linter can repair.
	$(RUN) ruff format
	$(RUN) ruff check --fix

bench: install-all ## Run every benchmark; each prints JSON and the machine. One that fails does not stop the others.
	@failed=; \
	for file in $$(grep -l '^if __name__ == "__main__":' benchmarks/*.py); do \
		name=$$(basename $$file .py); \
		echo "benchmark $$name" >&2; \
		$(RUN) python -m benchmarks.$$name || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

screenshots: install-dev ## Make the pictures of Dagster's UI in docs/images, while `make up` runs; needs Chromium.
	$(RUN) python docs/screenshots.py

clean: ## Remove caches and build output; data in .streamforge and the environments stay.
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist build
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './.uv/*' -prune -exec rm -rf {} +
