#!/bin/sh
# The last step of a build stage: what services never read goes, and equal sources give equal layers, whenever built.
#   /seal         the installed service, compiled once and for good, the user that it runs as, and its health check
#   /seal-owned   folders of that user, for /srv: a named volume takes its owner from them
set -eu
site=$(echo /opt/ramrec/lib/python3*/site-packages)
for unread in torch/test torch/include torch/share pyarrow/tests pyarrow/include; do rm -rf "${site:?}/$unread"; done
find "$site" -name '*.a' -delete
find "$site" -path '*/torch/bin/*' ! -name torch_shm_manager -delete
/opt/ramrec/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/ramrec/lib || true # some are templates

mkdir -p /seal/etc /seal/usr/local/bin /seal-owned/run /seal-owned/data /seal-owned/keys
{ cat /etc/passwd; echo "ramrec:x:10001:10001::/tmp:/usr/sbin/nologin"; } > /seal/etc/passwd
{ cat /etc/group; echo "ramrec:x:10001:"; } > /seal/etc/group
cat > /seal/usr/local/bin/ready <<'END'
#!/bin/bash
# ready PORT: whether /health/ready answers 200. A hundredth of what starting Python for it costs.
exec 3<> "/dev/tcp/127.0.0.1/$1" || exit 1
printf 'GET /health/ready HTTP/1.0\r\n\r\n' >&3
read -r -t 2 _ status _ <&3
[ "$status" = 200 ]
END
chmod 755 /seal/usr/local/bin/ready
mkdir /seal/opt
mv /opt/ramrec /seal/opt/
find /seal /seal-owned -exec touch -h -d @0 {} +
