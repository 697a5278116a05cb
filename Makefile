# Two commands on a fresh machine: `make quickstart` and `make test`. Both make .venv.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
SEED ?= 0
BIN := $(VENV)/bin

.PHONY: help quickstart test test-peers lint format clean

help:
	@echo "make quickstart   install, train every stage on the embedded world, write $(RUN)/report.html"
	@echo "make test         install what the tests need, run them"
	@echo "make test-peers   the same numbers against torch and transformers (large download)"
	@echo "make lint         ruff, as the tests expect it;  make format  puts it right"
	@echo "make clean        remove .venv and caches (runs/ stays)"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.report: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[report]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e ".[dev,peers]"
	@touch $@

quickstart: $(VENV)/.report
	$(BIN)/stagecraft run --config=experiments/quickstart.py --workdir=$(RUN) --config.seed=$(SEED)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not peers" -n 2 --dist loadgroup $(ARGS)

test-peers: $(VENV)/.peers
	$(BIN)/python -m pytest -m peers tests/peers $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
