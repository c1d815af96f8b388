#!/usr/bin/env bash
# Brings up a real Slurm cluster on this one machine: munged, (mariadbd + slurmdbd), slurmctld and one slurmd
# per emulated node, all on 127.0.0.1, without systemd. Needs root and Debian's packages. Everything it writes
# is under the state directory; nothing under /etc is changed, apart from what apt-get installs.
#
#   usage:  cluster_up.sh STATE_DIR       then:  . STATE_DIR/env.sh        stop:  cluster_down.sh STATE_DIR
#
# Running it again on a live cluster does nothing; on a dead or half-dead one it starts afresh.
# Settings (environment):
#   CLUSTER_NODES=2        emulated nodes n1..nN, one slurmd each
#   CLUSTER_CPUS=4         CPUs each node claims (may be more than the machine has)
#   CLUSTER_GPUS=0         made-up GPUs each node claims (no device behind them)
#   CLUSTER_PORT=36817     first of the ports used: ctld +0, dbd +1, mariadb +2, node i +10+i
#   CLUSTER_ACCOUNTING=1   0: no slurmdbd, so no sacct (submitit then can't see job states)
#   CLUSTER_KILLWAIT=5     seconds between SIGTERM and SIGKILL
#   CLUSTER_WAIT=60        seconds to wait for the nodes to be idle
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
unset SLURM_CONF

[ $# -eq 1 ] || { echo "usage: $0 STATE_DIR" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "$0: must be root (apt-get, mount namespace, slurmd)" >&2; exit 2; }
nodes=${CLUSTER_NODES:-2} cpus=${CLUSTER_CPUS:-4} gpus=${CLUSTER_GPUS:-0} port=${CLUSTER_PORT:-36817}
acct=${CLUSTER_ACCOUNTING:-1} killwait=${CLUSTER_KILLWAIT:-5} wait_s=${CLUSTER_WAIT:-60}
mkdir -p "$1"; S=$(cd "$1" && pwd -P)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# Unix socket paths hold 107 characters; slurmstepd's is STATE/spool/n1/n1_<job>.<step>
[ ${#S} -le 60 ] || { echo "$0: state directory path too long (${#S} > 60 characters): $S" >&2; exit 2; }
case $S in *[!A-Za-z0-9/._-]*) echo "$0: state directory path must be plain ([A-Za-z0-9/._-]): $S" >&2; exit 2;; esac
say() { echo "cluster: $*"; }
# NoInAddrAny makes every daemon and srun bind to what this machine's own name resolves to: that must be loopback
me=$(getent ahostsv4 "$(uname -n)" | awk 'NR == 1 {print $1}') || true
case $me in 127.*) ;; *) echo "$0: the machine's name $(uname -n) resolves to '${me:-nothing}', not to 127.x.x.x;" \
  "fix it with: echo '127.0.0.1 $(uname -n)' >>/etc/hosts" >&2; exit 1;; esac

# ---- packages ------------------------------------------------------------------------------------------------
pkgs=()
need() { command -v "$1" >/dev/null || pkgs+=("$2"); }
need munged munge; need slurmctld slurmctld; need slurmd slurmd; need sbatch slurm-client
need ss iproute2; need unshare util-linux
if [ "$acct" = 1 ]; then need slurmdbd slurmdbd; need mariadbd mariadb-server-core; fi
if [ ${#pkgs[@]} -gt 0 ]; then
  say "installing ${pkgs[*]}"; t=$SECONDS
  # RUNLEVEL=1: invoke-rc.d starts no service on install
  inst() { RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y -q \
             --no-install-recommends "${pkgs[@]}" </dev/null >"$S/apt.log" 2>&1; }
  inst || { apt-get -o DPkg::Lock::Timeout=120 update -q </dev/null >"$S/apt-update.log" 2>&1 && inst; } ||
    { tail -n 20 "$S/apt.log" >&2; exit 1; }
  say "installed in $((SECONDS - t)) s"
fi

unshare -m --propagation slave true || { echo "$0: needs mount namespaces (unshare -m)" >&2; exit 1; }

# ---- already up? ---------------------------------------------------------------------------------------------
export SLURM_CONF=$S/etc/slurm.conf
daemons=(munged); [ "$acct" = 1 ] && daemons+=(mariadbd slurmdbd); daemons+=(slurmctld)
for ((i = 1; i <= nodes; i++)); do daemons+=("slurmd-n$i"); done
ours() { # pid file -> true if that process lives and is the one started for this state directory
  local p; p=$(cat "$S/run/$1.pid" 2>/dev/null) && [ -n "$p" ] || return 1
  [ "$(cat "/proc/$p/comm" 2>/dev/null)" = "${1%%-*}" ] || return 1
  tr '\0' '\n' 2>/dev/null <"/proc/$p/environ" | grep -qxF "CLUSTER_STATE=$S"
}
all_idle() { [ "$(timeout 10 sinfo -h -N -p main -o %T 2>/dev/null | grep -cxE 'idle|mixed|allocated')" = "$nodes" ]; }
how() {
  say "up: $nodes nodes x $cpus CPUs, state in $S"
  echo "  use:   . $S/env.sh        (exports SLURM_CONF; then sinfo, srun, sbatch, submitit)"
  echo "  logs:  $S/log/"
  echo "  stop:  bash $here/cluster_down.sh $S"
}
if [ -f "$SLURM_CONF" ]; then
  live=1; for d in "${daemons[@]}"; do ours "$d" || live=0; done
  if [ $live = 1 ] && all_idle; then say "already running"; how; exit 0; fi
  say "found a stopped or broken cluster there: clearing it"
  bash "$here/cluster_down.sh" "$S"
fi

# ---- configuration -------------------------------------------------------------------------------------------
rm -rf "$S"/{etc,run,log,state,spool,munge,db,env.sh}
mkdir -p "$S"/{etc,run,log,state,spool,munge}
chmod 755 "$S" "$S/munge"
for ((i = 1; i <= nodes; i++)); do mkdir -p "$S/spool/n$i"; done
busy=$(ss -Hltn | awk '{sub(/.*:/, "", $4); print $4}' | sort -un)
for p in "$port" $((port + 1)) $((port + 2)) $(seq $((port + 11)) $((port + 10 + nodes))); do
  grep -qx "$p" <<<"$busy" && { echo "$0: port $p is taken; set CLUSTER_PORT" >&2; exit 1; }
done
sock=$S/munge/munge.sock
head -c 1024 /dev/urandom >"$S/munge/munge.key"; chmod 400 "$S/munge/munge.key"
mem=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
{
  cat <<CONF
ClusterName=ci
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$port
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (120 if left out)
AuthInfo=socket=$sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
# batch_sched_delay: submitit makes the job's log folder only after sbatch returns, so don't start jobs at once
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
# a new cluster must not reuse job ids: submitit would read an old job's result in the same folder
FirstJobId=$(($(date +%s) % 50000000 + 1))
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool/%n
SlurmctldPidFile=$S/run/slurmctld.pid
SlurmdPidFile=$S/run/slurmd-%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
KillWait=$killwait
CONF
  if [ "$acct" = 1 ]; then cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
# with munge this is the socket's path, not a password; AuthInfo is not used for slurmdbd
AccountingStoragePass=$sock
CONF
  else echo "AccountingStorageType=accounting_storage/none"; fi
  [ "$gpus" -gt 0 ] && echo "GresTypes=gpu"
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=n$i NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 10 + i)) CPUs=$cpus RealMemory=$mem$(
      [ "$gpus" -gt 0 ] && echo " Gres=gpu:$gpus") State=UNKNOWN"
  done
  echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20"
  echo "PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off"
} >"$S/etc/slurm.conf"
if [ "$gpus" -gt 0 ]; then # made-up devices (copies of /dev/null): slurmd only looks whether they are there
  mkdir "$S/etc/gpu"; for ((i = 0; i < gpus; i++)); do mknod "$S/etc/gpu/dev$i" c 1 3; done
  echo "NodeName=n[1-$nodes] Name=gpu File=$S/etc/gpu/dev[0-$((gpus - 1))]" >"$S/etc/gres.conf"
fi
cat >"$S/env.sh" <<CONF
export SLURM_CONF=$SLURM_CONF
CONF
# the nodes' names must resolve inside jobs (torch's MASTER_ADDR is n1): each slurmd gets its own /etc/hosts
{ cat /etc/hosts; printf '127.0.0.1'; for ((i = 1; i <= nodes; i++)); do printf ' n%s' "$i"; done; echo; } >"$S/etc/hosts"

# ---- daemons -------------------------------------------------------------------------------------------------
# CLUSTER_STATE in a daemon's environment is how cluster_down.sh knows it for ours. No daemon may keep the
# caller's pipes open, or CI would hang on them.
trap 'echo "cluster: failed; stopping what was started" >&2; bash "$here/cluster_down.sh" "$S" >&2' ERR
start() { env CLUSTER_STATE="$S" "$@" </dev/null >>"$S/log/start.log" 2>&1; }
until_port() { # port name
  for ((k = 0; k < 200; k++)); do ss -Hltn "sport = :$1" | grep -q . && return 0; sleep .1; done
  echo "$2 is not listening on $1" >&2; tail -n 5 "$S"/log/*.log >&2; return 1
}
start munged --key-file="$S/munge/munge.key" --socket="$sock" --pid-file="$S/run/munged.pid" \
  --log-file="$S/log/munged.log" --seed-file="$S/munge/munged.seed" --num-threads=10
if [ "$acct" = 1 ]; then
  D=$S/db; mkdir -p "$D/data"
  my=(--no-defaults --user=root --datadir="$D/data" --innodb-log-file-size=16M --innodb-buffer-pool-size=64M
    --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900)
  { printf 'create database mysql;\nuse mysql;\nset @auth_root_socket=NULL;\nset @skip_auth_anonymous=1;\n'
    cat /usr/share/mysql/mysql_system_tables.sql /usr/share/mysql/mysql_performance_tables.sql \
      /usr/share/mysql/mysql_system_tables_data.sql
  } | mariadbd "${my[@]}" --bootstrap >"$S/log/mariadb-bootstrap.log" 2>&1
  dbpass=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
  cat >"$D/init.sql" <<SQL
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE OR REPLACE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '$dbpass';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
SQL
  chmod 600 "$D/init.sql"
  # mariadbd stays in the foreground; setsid -f, not "&": a waiting subshell would hold the caller's stdout open
  start setsid -f mariadbd "${my[@]}" --socket="$D/db.sock" --port=$((port + 2)) --bind-address=127.0.0.1 \
    --skip-name-resolve --init-file="$D/init.sql" --pid-file="$S/run/mariadbd.pid" --log-error="$S/log/mariadbd.log"
  until_port $((port + 2)) mariadbd
  cat >"$S/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$sock
CommunicationParameters=NoInAddrAny
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
DebugLevel=verbose
LogFile=$S/log/slurmdbd.log
PidFile=$S/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=slurm
StoragePass=$dbpass
StorageLoc=slurm_acct_db
CONF
  chmod 600 "$S/etc/slurmdbd.conf"
  start slurmdbd
  until_port $((port + 1)) slurmdbd
  start sacctmgr -i add cluster ci
fi
start slurmctld -f "$SLURM_CONF"
until_port "$port" slurmctld
# Starts the daemon of a node, now and when a test has killed it. The mount's source, as the kernel names it, marks every
# process of the cluster's jobs for cluster_down.sh.
cat >"$S/slurmd.sh" <<CONF
exec env CLUSTER_STATE="$S" unshare -m --propagation slave bash -c 'mount --bind "$S/etc/hosts" /etc/hosts &&
  awk "\\\$5 == \\"/etc/hosts\\" {m = \\\$4} END {print m}" /proc/self/mountinfo >"$S/run/mark" &&
  exec slurmd -f "$SLURM_CONF" -N "\$1"' _ "\$1" </dev/null >>"$S/log/start.log" 2>&1
CONF
for ((i = 1; i <= nodes; i++)); do bash "$S/slurmd.sh" "n$i"; done
for ((k = 0; k < wait_s * 5; k++)); do all_idle && break; sleep .2; done
trap - ERR
if ! all_idle; then
  echo "cluster: nodes not idle after $wait_s s" >&2; sinfo -N -l >&2 || true; tail -n 20 "$S"/log/slurm*.log >&2 || true
  bash "$here/cluster_down.sh" "$S" >&2; exit 1
fi
sinfo -N -o '%N %T %c CPUs %P'
how
