# `make demo` and `make test` each set up everything on a machine that has Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One tested pair. Another one: make TORCH="torch==2.11.0 torchvision==0.26.0"
TORCH ?= torch==2.13.0 torchvision==0.28.0
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

# accessibility rules for the tests of the report, no part of the product
AXE := axe-core-4.14.1
AXE_SHA256 := e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745

BENCHMARKS := p1_train p2_pgd p3_autoattack p4_certify p5_schedule p6_startup p7_overhead p8_seeds p9_tables

.PHONY: demo test test-full lint setup docs wheel axe clean bench $(BENCHMARKS)

demo: $(VENV)/ready
	$(BIN)/bench run specs/demo.yaml --results-dir demo-results
	@$(BIN)/bench leaderboard --results-dir demo-results --output demo-results/leaderboard.md
	@echo; echo "Next, two commands to type:"
	@echo "  $(BIN)/bench report --results-dir demo-results --output demo-results/report.html"
	@echo "  $(BIN)/bench run --defense noisy --eps 8/255"

test: $(VENV)/ready-dev lint
	$(BIN)/pytest -n $(JOBS) -m "not slow and not fault" tests

test-full: $(VENV)/ready-dev
	$(BIN)/pytest -n $(JOBS) -m "slow or fault" tests

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy bench attacks defenses
	$(BIN)/lint-imports

# two at a time; BENCH_DATA=FOLDER, where MNIST is
bench: $(VENV)/ready-dev
	$(MAKE) -j2 $(BENCHMARKS)

p3_autoattack: options = --net lenet5 --pairs 1
$(BENCHMARKS):
	$(BIN)/python benchmarks/$@.py $(options)

setup: $(VENV)/ready-dev

# the variable leaves out what Material prints about its successors; the extra stays below MkDocs 2
docs: $(VENV)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/ready-dev
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

# torch first: a plain install of the rest would otherwise choose its own build
$(VENV)/ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: $(PYTHON) is older than 3.11; make PYTHON=python3.11"; exit 3; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "torchattacks>=3.5.1" "adv-lib>=0.2.8"
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

axe: $(VENV)/axe-core/package/axe.min.js

$(VENV)/axe-core/package/axe.min.js:
	mkdir -p $(VENV)/axe-core
	cd $(VENV)/axe-core && npm pack --silent --ignore-scripts $(subst core-,core@,$(AXE)) && echo "$(AXE_SHA256)  $(AXE).tgz" | sha256sum --check --quiet && tar -xzf $(AXE).tgz

clean:
	rm -rf $(VENV) demo-results site
