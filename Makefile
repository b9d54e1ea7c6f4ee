# make quickstart: from nothing to recommendations.  make test, make check: what CI runs.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check format install bench-quality clean

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

# Three seeds of ML-100K and their report; trained seeds are reused.
SEEDS := 0 1 2
bench-quality: $(BIN)/.ready
	$(BIN)/ramrec data ml-100k --out data/ml-100k
	for seed in $(SEEDS); do test -f runs/ml-100k-seed$$seed/checkpoint.json || OMP_NUM_THREADS=1 \
	  $(BIN)/ramrec train --dataset data/ml-100k --config ml-100k --seed $$seed --out runs/ml-100k-seed$$seed; done
	$(BIN)/ramrec evaluate $(SEEDS:%=--run runs/ml-100k-seed%) --dataset data/ml-100k --json benchmarks/quality/ml-100k.json

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
