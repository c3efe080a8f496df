#!/bin/bash
# Starts Ray on a machine of cluster/ray-cluster.yaml and waits until it answers.
#
#   node.sh head [OPTIONS OF ray start]           the machine that takes jobs
#   node.sh worker ADDRESS [OPTIONS OF ray start] any other; joins the head at ADDRESS (host:port)
#
# A Ray that this script started before is ended first, by its process id: `ray stop` would end everybody's.
set -u
role=$1
shift
home=${HEADSPLAT_RAY_HOME:-$HOME/.headsplat-ray}
patience=${HEADSPLAT_RAY_PATIENCE:-180}
mkdir -p "$home"

if [ -f "$home/pid" ] && kill "$(cat "$home/pid")" 2>/dev/null; then
    for _ in $(seq 30); do
        kill -0 "$(cat "$home/pid")" 2>/dev/null || break
        sleep 1
    done
fi

if [ ! -s "$HOME/.ray/auth_token" ] && [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
    echo "There is no $HOME/.ray/auth_token: run 'ray get-auth-token --generate' where you call 'ray up'; the cluster" \
        "file copies it to all machines." >&2
    exit 1
fi
export RAY_AUTH_MODE=token

if [ "$role" = head ]; then
    address=${HEADSPLAT_RAY_IP:-$(hostname -I | cut -d ' ' -f 1)}:${HEADSPLAT_RAY_PORT:-6379}
    words=(--head --node-ip-address="${address%:*}" --port="${address#*:}")
else
    address=$1
    shift
    words=(--address="$address")
fi
# --block keeps this Ray's processes under one that can be ended; setsid keeps it alive when the connection closes.
setsid nohup ray start "${words[@]}" "$@" --block >"$home/log" 2>&1 </dev/null &
echo $! >"$home/pid"
echo "$address" >"$home/address"

for _ in $(seq "$patience"); do
    if grep -q "Ray runtime started" "$home/log"; then
        exit 0
    fi
    if ! kill -0 "$(cat "$home/pid")" 2>/dev/null; then
        break
    fi
    sleep 1
done
echo "Ray did not start on $(hostname), for which it had $patience seconds; the end of $home/log:" >&2
tail -n 5 "$home/log" >&2
kill "$(cat "$home/pid")" 2>/dev/null
exit 1
