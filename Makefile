# make demo | test | check | bench | help. Everything runs in .venv, made on first use from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help install demo test check format lint types layers bench clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/ready ## make .venv with everything in it

demo: $(VENV)/ready ## four simulated hospitals, from images to report, in minutes
	$(BIN)/medfl simulate run.dir=runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/ready ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: format lint types layers test ## what CI runs

format: $(VENV)/ready
	$(BIN)/ruff format --check .

lint: $(VENV)/ready
	$(BIN)/ruff check .

types: $(VENV)/ready
	$(BIN)/mypy

layers: $(VENV)/ready
	$(BIN)/lint-imports

bench: $(VENV)/ready ## measure speed on this machine and write it to benchmarks/RESULTS.md (an hour)
	PYTHONPATH=. $(BIN)/python benchmarks/bench.py $(BENCH)

clean: ## remove .venv and caches; runs stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
