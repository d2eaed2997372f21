#!/usr/bin/env bash
# A SLURM cluster of several nodes on one host, for tests; needs root and Debian's slurmctld, slurmd, slurm-client, munge.
#     bash tests/scripts/slurm.sh start DIR [NODES]     then: export SLURM_CONF=DIR/slurm.conf
#     bash tests/scripts/slurm.sh stop DIR
# All files are in DIR. Each node reports 16 cores, 200 GB and 4 GPUs, whatever the host has.
set -euo pipefail
action=$1 dir=$2 nodes=${3:-1}
export SLURM_CONF=$dir/slurm.conf

stop() {
    local file
    for file in "$dir"/*.pid; do
        [ ! -e "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
    done
}

free_ports() { # N: the first of N consecutive free ports
    python3 - "$1" <<'PYTHON'
import random, socket, sys
while True:
    first = random.randrange(20000, 32000)
    try:
        for port in range(first, first + int(sys.argv[1])):
            socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        continue
    sys.exit(print(first))
PYTHON
}

start() {
    mkdir -p "$dir/state" "$dir/munge"
    chmod 700 "$dir/munge"
    head -c 256 /dev/urandom >"$dir/munge/key"
    chmod 400 "$dir/munge/key"
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge.pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    local port host
    port=$(free_ports $((nodes + 1)))
    host=$(hostname -s)
    for gpu in 0 1 2 3; do mknod "$dir/gpu$gpu" c 1 3; done # null devices in place of GPUs
    echo "Name=gpu File=$dir/gpu[0-3]" >"$dir/gres.conf"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=20
CONF
    local node
    for node in $(seq "$nodes"); do
        mkdir -p "$dir/spool-n$node"
        echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=16" \
            "RealMemory=200000 Gres=gpu:4" >>"$dir/slurm.conf"
    done
    echo "PartitionName=all Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP" >>"$dir/slurm.conf"
    slurmctld
    for node in $(seq "$nodes"); do slurmd -N "n$node"; done
    for _ in $(seq 100); do
        [ "$(sinfo --noheader --format='%T %D' 2>/dev/null || true)" != "idle $nodes" ] || return 0
        sleep 0.1
    done
    sinfo --list-reasons >&2 || true
    tail "$dir"/*.log >&2
    stop
    echo "slurm.sh: error: the nodes did not come up within 10 s" >&2
    exit 1
}

case $action in
start) start ;;
stop) stop ;;
*) echo "slurm.sh: error: unknown action $action; give start or stop" >&2 && exit 2 ;;
esac
