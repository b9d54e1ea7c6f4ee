#!/bin/bash
# The container tests with the Docker engine that there is; else with a throw-away one, where ENGINE names a script that
# brings one up (install, start, images, env, override, stop). Skipped, and said so, only where neither can be had.
#   PYTEST=.venv/bin/pytest tests/compose/run.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/../.."
ENGINE=${ENGINE:-../shared/containers/engine.sh}

skip() {
    echo "test-compose SKIPPED: $1"
    exit 0
}

usable() {
    docker info > /dev/null 2>&1 && docker compose version > /dev/null 2>&1
}

if ! usable; then
    [ -f "$ENGINE" ] || skip "no Docker engine with Compose here"
    eval "$(bash "$ENGINE" env)"
    if ! usable; then
        log=$(mktemp)
        trap 'bash "$ENGINE" stop || true' EXIT
        { bash "$ENGINE" install && bash "$ENGINE" start && bash "$ENGINE" images && usable; } > "$log" 2>&1 || {
            tail -20 "$log"
            skip "no Docker engine can be brought up on this machine"
        }
    fi
    RAMREC_COMPOSE_OVERRIDE=$(bash "$ENGINE" override docker-compose.yml)
    export RAMREC_COMPOSE_OVERRIDE
    export TORCH_INDEX="" # the stand-in base image brings PyTorch's CPU build
fi
"${PYTEST:-pytest}" --timeout=1800 tests/compose "$@"
