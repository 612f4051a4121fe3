#!/usr/bin/env bash
# Makes hosts of network namespaces on this machine (Linux, as root), to try a job over several of them:
#   bash launch/hosts.sh up 2 1gbit             two hosts, node0 and node1, on links of 1 Gbit/s
#   bash launch/hosts.sh each bash launch/torchrun.sh --stop-at 20    a command on each, at once
#   bash launch/hosts.sh on 1 COMMAND...        a command on node1
#   bash launch/hosts.sh rate 100mbit           another rate of all links
#   bash launch/hosts.sh down                   all of them away, and what runs there
# A command finds NODES and MASTER_ADDR set, as launch/torchrun.sh reads them, and the hosts' names
# resolve. They share the file system and the CPUs, have networks and hostnames of their own, and
# reach nothing else.
set -euo pipefail

PREFIX=${HOSTS_PREFIX:-sdhost} # of the namespaces' names: another one for hosts beside these
NET=10.77.0                    # their addresses: NET.1 is node0

hosts() { # the names of the namespaces that are up, switch left out
  ip netns list | awk '{print $1}' | grep -E "^$PREFIX[0-9]+$" | sort -V || true
}

down() {
  local name
  for name in $(hosts) "$PREFIX-switch"; do
    ip netns pids "$name" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
    ip netns delete "$name" 2>/dev/null || true
    rm -rf "/etc/netns/$name"
  done
}

# shape RATE: what leaves each host, and what the switch sends to it, goes at RATE (a word of tc).
shape() {
  local name
  for name in $(hosts); do
    ip netns exec "$name" tc qdisc replace dev eth0 root tbf rate "$1" burst 256kb latency 50ms
    ip netns exec "$PREFIX-switch" \
      tc qdisc replace dev "to${name#"$PREFIX"}" root tbf rate "$1" burst 256kb latency 50ms
  done
}

up() { # HOSTS RATE
  local i name switch=$PREFIX-switch
  down
  ip netns add "$switch"
  ip netns exec "$switch" ip link add bridge type bridge
  ip netns exec "$switch" ip link set bridge up
  for ((i = 0; i < $1; i++)); do
    name=$PREFIX$i
    ip netns add "$name"
    ip link add eth0 netns "$name" type veth peer name "to$i" netns "$switch"
    ip netns exec "$switch" ip link set "to$i" master bridge up
    ip netns exec "$name" ip address add "$NET.$((i + 1))/24" dev eth0
    ip netns exec "$name" ip link set eth0 up
    ip netns exec "$name" ip link set lo up
    mkdir -p "/etc/netns/$name" # ip netns exec puts what lies there in the place of /etc/hosts
    { echo 127.0.0.1 localhost; seq 0 $(($1 - 1)) | awk -v n="$NET" '{print n "." $1+1, "node" $1}'; } \
      >"/etc/netns/$name/hosts"
  done
  shape "$2"
}

on() { # HOST COMMAND...
  local host=$1
  shift
  NODES=$(hosts | wc -l) MASTER_ADDR=$NET.1 exec ip netns exec "$PREFIX$host" \
    unshare --uts bash -c 'hostname "$0" && exec "$@"' "node$host" "$@"
}

each() { # COMMAND...
  local name status=0 pids=()
  for name in $(hosts); do
    (on "${name#"$PREFIX"}" "$@") &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  exit "$status"
}

action=${1:-}
shift || true
case $action in
  up) up "$@" ;;
  rate) shape "$@" ;;
  on) on "$@" ;;
  each) each "$@" ;;
  down) down ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
