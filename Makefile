# Two commands on a fresh machine: `make quickstart` and `make test`. Both make .venv.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
SEED ?= 0
TIER ?= 1
ACCELERATOR ?= cuda
BIN := $(VENV)/bin

.PHONY: help quickstart quick test test-whole test-processes test-peers test-plan accelerator-check mutants notebooks claims lint format clean

help:
	@echo "make quickstart   install, train every stage on the embedded world, write $(RUN)/report.html"
	@echo "make test         install what the tests need, run them"
	@echo "make test-whole   whole notebooks and experiments, which make test leaves out"
	@echo "make quick        those that take long left out: one to two minutes on two cores"
	@echo "make test-peers   the same numbers against torch, transformers and TRL (large download);"
	@echo "                  SEED=N draws other cases"
	@echo "make test-processes  the quickstart on one, two and four processes: many minutes"
	@echo "make test-plan    compile for TPUs that are not here (libtpu, 700 MB)"
	@echo "make accelerator-check  kernels, bfloat16, sharding and speed of the GPU here;"
	@echo "                  ACCELERATOR=tpu of the TPU; writes docs/speed.md's table"
	@echo "make mutants      break the sources on purpose, place by place: does a test notice?"
	@echo "make claims       ask every claim over four seeds (TIER=2: eight): hours; it resumes"
	@echo "make notebooks    run the notebooks and store what they show"
	@echo "make lint         ruff and types, as the tests expect it;  make format  puts it right"
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

# The last TRL with PPO lies beside the one the extra installs: a process imports either.
$(VENV)/.peers: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e ".[dev,peers]"
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/trl112 trl==1.12.0
	@touch $@

$(VENV)/.cuda $(VENV)/.tpu: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e ".[dev,$(ACCELERATOR)]"
	@touch $@

$(VENV)/.plan: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e ".[dev,plan]"
	@touch $@

quickstart: $(VENV)/.report
	$(BIN)/stagecraft run --config=experiments/quickstart.py --workdir=$(RUN) --config.seed=$(SEED)

# The order is that of tests/conftest.py: the longest first.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

quick: $(VENV)/.dev
	$(PYTEST) -m "not slow and not whole and not peers and not processes" $(ARGS)

test: $(VENV)/.dev
	$(PYTEST) -m "not whole and not peers and not processes" $(ARGS)

test-whole: $(VENV)/.dev
	$(PYTEST) -m whole $(ARGS)

test-processes: $(VENV)/.dev
	$(BIN)/python -m pytest -m processes tests/processes $(ARGS)

test-peers: $(VENV)/.peers
	$(PYTEST) -m peers tests/peers --parity-seed=$(SEED) $(ARGS)

test-plan: $(VENV)/.plan
	$(BIN)/python -m pytest -p no:xdist tests/pods/plan_test.py $(ARGS)

accelerator-check: $(VENV)/.$(ACCELERATOR)
	$(BIN)/python -m pytest -p no:xdist -m accelerator tests $(ARGS)
	$(BIN)/stagecraft bench --preset=1b --length=4096 --page=docs/speed.md

mutants: $(VENV)/.dev
	$(BIN)/python tests/mutations.py --jobs=2 $(ARGS)

claims: $(VENV)/.report
	$(BIN)/stagecraft claims --workdir=runs/claims --tier=$(TIER)

notebooks: $(VENV)/.dev
	$(BIN)/python -m tests.notebooks

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
