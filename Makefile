PYTHON ?= python3
BIN := .venv/bin

JOBS ?= $(if $(FILES),0,auto)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo test test-all test-browser test-cuda test-oldest mutate crash lint docs bench clean
.DELETE_ON_ERROR:

# .venv is built again only when pyproject.toml changed
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/steer sample --config recipes/configs/demo.yaml --overwrite true

# FILES=tests/test_x.py: these alone, in one process; JOBS=2: in two
test: .venv/installed
	$(PYTEST) -m 'not slow and not browser' $(FILES)

test-all: .venv/installed
	$(PYTEST) -m 'not browser' $(FILES)

# the studio in Debian's chromium (apt-get install chromium)
test-browser: .venv/installed
	$(BIN)/python -m pytest -m browser tests/browser

# on an NVIDIA card; all other tests hide it
test-cuda: .venv/installed
	TEST_DEVICE=cuda $(BIN)/python -m pytest -n $(JOBS) tests/test_cuda.py

# the oldest releases that pyproject.toml allows, in an environment of their own
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q uv
	.venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python --resolution lowest-direct -e '.[diffusers,serve]'
	.venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python -e '.[dev]'
	.venv-oldest/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow and not browser' $(FILES)

# seeded changes of single lines, and whether their tests notice: goes on where it was cut
mutate: .venv/installed
	nice -n 10 $(BIN)/python -m benchmarks.mutate --out outputs/mutate

# kill -9, or a full disk, at every write of a tuning, a sampling and a training run
crash: .venv/installed
	$(BIN)/python -m pytest -rP tests/test_crash.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_docs.py

# the site, into build/site: a warning ends it
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/installed
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.map_cost

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
