# make demo: a virtual environment, an install, a text crammed, decoded and certified.
# make test: the same environment plus test tools; lint, types and the whole suite.
# make coverage: the same again, with the lines that no test reaches.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Pinned to the letter: some registries keep the small CPU build under exactly this version.
TORCH ?= torch==2.13.0

.PHONY: demo test coverage lint install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "$(TORCH)" $$($(BIN)/python tests/requirements.py)
	touch $@

demo: $(VENV)/.installed
	mkdir -p demo
	$(BIN)/memvec cram examples/letter.txt --output demo/letter.mem --force
	$(BIN)/memvec verify demo/letter.mem
	$(BIN)/memvec decode demo/letter.mem > demo/letter.txt
	$(BIN)/memvec cram examples/sentence.txt --tokens 64 --output demo/sentence.mem --force
	$(BIN)/memvec cram examples/paragraph.txt --vectors 4 --tokens 120 --output demo/paragraph.mem --force
	cmp examples/letter.txt demo/letter.txt && echo "demo/letter.txt is examples/letter.txt, byte for byte."

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

coverage: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --cov --cov-report=term-missing:skip-covered

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .coverage
