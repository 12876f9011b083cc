PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all crash lint bench clean
.DELETE_ON_ERROR:

# .venv is built again only when pyproject.toml changed
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/steer sample --config recipes/configs/demo.yaml --overwrite true

test: .venv/installed
	$(BIN)/python -m pytest -m 'not slow'

test-all: .venv/installed
	$(BIN)/python -m pytest

# kill -9, or a full disk, at every write of a tuning, a sampling and a training run
crash: .venv/installed
	$(BIN)/python -m pytest -rP tests/test_crash.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_docs.py

bench: .venv/installed
	$(BIN)/python -m benchmarks.step

clean:
	rm -rf .venv build dist *.egg-info
