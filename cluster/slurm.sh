#!/usr/bin/env bash
# A Ray cluster inside a Slurm allocation, and one job on it:
#
#   sbatch --nodes 3 cluster/slurm.sh python jobs/rl_math.py --preset llama-3.1-8b --cluster.learner-ranks 8 ...
#
# The first node carries the head and services, the next LEARNER_NODES the learner, all others engines. Authentication is
# on: the token is made for this allocation and reaches its nodes through the environment alone. Give --output-dir on a
# file system that all nodes see.
#SBATCH --job-name=cola-ray
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
set -euo pipefail

: "${LEARNER_NODES:=1}"
: "${PORT:=6379}"
[[ $# -gt 0 ]] || { echo "usage: sbatch --nodes N cluster/slurm.sh COMMAND ..." >&2; exit 2; }
((SLURM_JOB_NUM_NODES > LEARNER_NODES + 1)) || {
  echo "--nodes ${SLURM_JOB_NUM_NODES}: needs one for services, ${LEARNER_NODES} for the learner and one for engines" >&2
  exit 2
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_address="$(srun --nodes 1 --ntasks 1 --nodelist "${nodes[0]}" hostname --ip-address | awk '{print $1}'):$PORT"
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_MODE RAY_AUTH_TOKEN

start() {  # node, what ray start is told
  srun --nodes 1 --ntasks 1 --overlap --export ALL --nodelist "$1" ray start --block "${@:2}" &
}

start "${nodes[0]}" --head --port "$PORT" --num-gpus 0 --resources '{"service": 64}'
until RAY_ADDRESS="$head_address" ray status >/dev/null 2>&1; do sleep 2; done
for index in "${!nodes[@]}"; do
  ((index == 0)) && continue
  group=$((index <= LEARNER_NODES ? 0 : 1))
  names=(learner rollout)
  start "${nodes[index]}" --address "$head_address" --num-gpus 8 --resources "{\"${names[group]}\": 8}"
done
alive() { RAY_ADDRESS="$head_address" python -c 'import ray; ray.init(log_to_driver=False); print(sum(n["Alive"] for n in ray.nodes()))'; }
until [[ "$(alive)" -eq "${#nodes[@]}" ]]; do sleep 5; done

RAY_ADDRESS="$head_address" "$@" \
  --cluster.learner-group learner --cluster.rollout-group rollout --cluster.service-group service
