#!/bin/sh
# What the Redis containers run. The password, where there is one, is the secret `redis_password`: it stands in no
# argument and no environment.
#   redis.sh serve [OPTION …]     redis-server with these options
#   redis.sh node PEER …          a node of a Redis Cluster; finds its peers by name, whatever addresses they have got
#   redis.sh create NODE …        one cluster of these nodes, each second half a replica; nothing where there is one
#   redis.sh ready                whether it answers here, and has read its file
set -eu
secret=/run/secrets/redis_password
if [ -r "$secret" ]; then
    password=$(cat "$secret")
    export REDISCLI_AUTH="$password"
fi

serve() {
    exec redis-server - --appendonly yes --appendfsync everysec --save '' --protected-mode no \
        --maxmemory "${REDIS_MEMORY:-1gb}" --maxmemory-policy noeviction "$@" <<END
${password:+requirepass "$password"
masterauth "$password"}
END
}

ready() {
    [ "$(redis-cli -h "${1:-127.0.0.1}" ping 2>&1)" = PONG ]
}

address() {
    getent ahostsv4 "$1" | { read -r found _ && echo "$found"; }
}

# After a restart the others may have new addresses, all at once.
rejoin() {
    until ready; do sleep 0.2; done
    [ "$(redis-cli cluster info | tr -d '\r' | sed -n 's/^cluster_known_nodes://p')" -gt 1 ] || return 0
    for peer in "$@"; do redis-cli cluster meet "$(address "$peer")" 6379 || true; done
}

create() {
    if redis-cli -h "$1" cluster info | grep -q '^cluster_slots_assigned:16384'; then
        echo "there is a cluster already"
    else
        nodes=""
        for node in "$@"; do nodes="$nodes $(address "$node"):6379"; done
        # shellcheck disable=SC2086
        redis-cli --cluster create $nodes --cluster-replicas 1 --cluster-yes
    fi
    for node in "$@"; do
        until redis-cli -h "$node" cluster info | grep -q '^cluster_state:ok'; do sleep 0.2; done
    done
}

case "$1" in
serve)
    shift
    serve "$@"
    ;;
node)
    shift
    rejoin "$@" &
    serve --cluster-enabled yes --cluster-announce-hostname "$(hostname)" --cluster-preferred-endpoint-type hostname \
        --cluster-node-timeout 2000 --cluster-require-full-coverage no --repl-diskless-sync-delay 0
    ;;
create)
    shift
    create "$@"
    ;;
ready)
    ready
    ;;
esac
