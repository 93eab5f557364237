#!/usr/bin/env bash
# A Ray cluster inside a Slurm allocation, and one job on it:
#
#   sbatch --nodes 2 cluster/slurm.sh python jobs/rl_math.py --preset llama-3.1-8b --cluster.learner-ranks 8 ...
#
# The first LEARNER_NODES run the learner, all others engines; all GPUs of all nodes are used. The first node also runs
# the head and the services. Authentication is on: the token is made for this allocation and reaches its nodes only
# through the environment. --output-dir must be on a file system that all nodes see.
#SBATCH --job-name=cola-ray
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
set -euo pipefail

: "${LEARNER_NODES:=1}"
: "${PORT:=6379}"
: "${GPUS:=${SLURM_GPUS_ON_NODE:-8}}"
[[ $# -gt 0 ]] || { echo "usage: sbatch --nodes N cluster/slurm.sh COMMAND ..." >&2; exit 2; }
((SLURM_JOB_NUM_NODES > LEARNER_NODES)) || {
  echo "--nodes ${SLURM_JOB_NUM_NODES}: needs ${LEARNER_NODES} for the learner and one or more for engines" >&2
  exit 2
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_address="$(srun --nodes 1 --ntasks 1 --nodelist "${nodes[0]}" hostname --ip-address | awk '{print $1}'):$PORT"
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_MODE RAY_AUTH_TOKEN

start() {  # node, its resources, further arguments of ray start
  srun --nodes 1 --ntasks 1 --overlap --export ALL --nodelist "$1" \
    ray start --block --num-gpus "$GPUS" --resources "$2" "${@:3}" &
}

start "${nodes[0]}" "{\"service\": 64, \"learner\": $GPUS}" --head --port "$PORT"
until RAY_ADDRESS="$head_address" ray status >/dev/null 2>&1; do sleep 2; done
for index in "${!nodes[@]}"; do
  ((index == 0)) && continue
  name=$( ((index < LEARNER_NODES)) && echo learner || echo rollout)
  start "${nodes[index]}" "{\"$name\": $GPUS}" --address "$head_address"
done
alive() { RAY_ADDRESS="$head_address" python -c 'import ray; ray.init(log_to_driver=False); print(sum(n["Alive"] for n in ray.nodes()))'; }
until [[ "$(alive)" -eq "${#nodes[@]}" ]]; do sleep 5; done

RAY_ADDRESS="$head_address" "$@" \
  --cluster.learner-group learner --cluster.rollout-group rollout --cluster.service-group service
