#!/bin/sh
# Makes what docker/compose.secure.yml wants, and prints an API key for the administrator. What is there stays.
set -eu
cd "$(dirname "$0")/.."
secure="docker compose -f docker-compose.yml -f docker/compose.secure.yml"
mkdir -p secrets
touch secrets/prometheus_key
chmod 700 secrets # nobody else gets in; containers are handed single files, which their own users must be able to read
for name in redis_password memory_token feedback_key; do
    [ -s "secrets/$name" ] || head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n' > "secrets/$name"
    chmod 444 "secrets/$name"
done
if $secure run --rm keys list > /dev/null 2>&1; then
    echo "There are API keys already: $secure run --rm keys list"
else
    rm -f secrets/prometheus_key
    $secure run --rm keys create --name prometheus --scope admin | tr -d '\r\n' > secrets/prometheus_key
    chmod 444 secrets/prometheus_key
    echo "The administrator's API key, shown this once:"
    $secure run --rm keys create --name admin --scope recommend --scope ingest --scope admin
fi
echo "Start: $secure up --wait"
