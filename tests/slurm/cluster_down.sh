#!/usr/bin/env bash
# Stops the cluster that cluster_up.sh started for STATE_DIR: cancels its jobs, then ends its daemons by pid, each
# only if it carries this state directory's mark in its environment. Leaves the logs. Safe to run twice.
#   usage: cluster_down.sh STATE_DIR
set -uo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
[ $# -eq 1 ] || { echo "usage: $0 STATE_DIR" >&2; exit 2; }
[ -d "$1" ] || { echo "cluster: no such directory: $1"; exit 0; }
S=$(cd "$1" && pwd -P)
export SLURM_CONF=$S/etc/slurm.conf
marked() { # pid comm...: lives, has one of these names, and was started for this state directory
  local p=$1 c; shift; c=$(cat "/proc/$p/comm" 2>/dev/null) || return 1
  [[ " $* " == *" $c "* ]] && tr '\0' '\n' 2>/dev/null <"/proc/$p/environ" | grep -qxF "CLUSTER_STATE=$S"
}
stop() { # pid file, seconds
  local f=$S/run/$1.pid p k name=${1%%-*}; p=$(cat "$f" 2>/dev/null) && [ -n "$p" ] || return 0
  if marked "$p" "$name"; then
    kill "$p" 2>/dev/null
    for ((k = 0; k < $2 * 10; k++)); do marked "$p" "$name" || break; sleep .1; done
    marked "$p" "$name" && kill -9 "$p" 2>/dev/null && echo "cluster: $1 ($p) needed SIGKILL"
    echo "cluster: stopped $1 ($p)"
  fi
  rm -f "$f"
}
if [ -f "$SLURM_CONF" ] && marked "$(cat "$S/run/slurmctld.pid" 2>/dev/null || echo 0)" slurmctld; then
  jobs=$(timeout 10 squeue -h -o %A 2>/dev/null | sort -u)
  if [ -n "$jobs" ]; then
    echo "cluster: cancelling jobs" $jobs
    timeout 10 scancel $jobs 2>/dev/null
    for ((k = 0; k < 100; k++)); do [ -z "$(timeout 10 squeue -h 2>/dev/null)" ] && break; sleep .2; done
  fi
fi
for f in "$S"/run/slurmd-*.pid; do [ -e "$f" ] && stop "$(basename "$f" .pid)" 5; done
stop slurmctld 10
stop slurmdbd 10
stop mariadbd 20
stop munged 5
# what is left of jobs (steps that outlived a dead slurmctld, tasks that daemonized): all of it, and nothing else,
# sees this state directory's hosts file mounted on /etc/hosts
if mark=$(cat "$S/run/mark" 2>/dev/null) && [ -n "$mark" ]; then
  inside() { awk -v m="$mark" '$5 == "/etc/hosts" && $4 == m {f = 1} END {exit !f}' "/proc/$1/mountinfo" 2>/dev/null; }
  if inside self; then echo "cluster: run inside one of the cluster's own jobs; left its processes alone" >&2
  else for p in $(ls /proc | grep -E '^[0-9]+$'); do
      inside "$p" && echo "cluster: killing left-over $p ($(cat "/proc/$p/comm" 2>/dev/null))" && kill -9 "$p" 2>/dev/null
    done
  fi
fi
echo "cluster: done"
