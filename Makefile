# make demo   set up, then a federation on generated images; ends with the path of its report
# make test   set up, then linter, types, import layers and all tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed

.PHONY: setup demo test test-fast lint docs clean
setup: $(SETUP)

$(SETUP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("fedvision needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(SETUP)

demo: setup
	@$(BIN)/fedvision simulate --demo --out demo-$$(date +%Y%m%d-%H%M%S)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One process a core, one thread each: threads that wait for each other cost more than they bring.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-fast: setup
	$(BIN)/python -m pytest -m 'not slow'

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
