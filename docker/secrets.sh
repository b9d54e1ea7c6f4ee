#!/bin/sh
# Makes what docker/compose.secure.yml wants, and prints an API key for the administrator. What is there stays.
set -eu
cd "$(dirname "$0")/.."
folder=${RAMREC_SECRETS:-./secrets}
mkdir -p "$folder"
chmod 700 "$folder" # nobody else gets in; containers are handed single files, which their own users must be able to read
for name in redis_password memory_token feedback_key; do
    [ -s "$folder/$name" ] || head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n' > "$folder/$name"
    chmod 444 "$folder/$name"
done
if docker compose run --rm keys list > /dev/null 2>&1; then
    echo "There are API keys already: docker compose run --rm keys list"
else
    rm -f "$folder/prometheus_key"
    docker compose run --rm keys create --name prometheus --scope admin | tr -d '\r\n' > "$folder/prometheus_key"
    chmod 444 "$folder/prometheus_key"
    echo "The administrator's API key, shown this once:"
    docker compose run --rm keys create --name admin --scope recommend --scope ingest --scope admin
fi
echo "Start: docker compose -f docker-compose.yml -f docker/compose.secure.yml up --wait"
