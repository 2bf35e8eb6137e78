# `make demo` and `make test` each set up everything on a machine that has Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One tested pair. Another one: make TORCH="torch==2.11.0 torchvision==0.26.0"
TORCH ?= torch==2.13.0 torchvision==0.28.0
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-full lint setup clean

demo: $(VENV)/ready
	$(BIN)/bench run specs/demo.yaml --results-dir demo-results
	@$(BIN)/bench leaderboard --results-dir demo-results --output demo-results/leaderboard.md

test: $(VENV)/ready-dev lint
	$(BIN)/pytest -n $(JOBS) -m "not slow and not fault" tests

test-full: $(VENV)/ready-dev
	$(BIN)/pytest -n $(JOBS) -m "slow or fault" tests

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy bench attacks defenses
	$(BIN)/lint-imports

setup: $(VENV)/ready-dev

# torch first: a plain install of the rest would otherwise choose its own build
$(VENV)/ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: $(PYTHON) is older than 3.11; make PYTHON=python3.11"; exit 3; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "torchattacks>=3.5.1"
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-results
