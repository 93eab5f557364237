#!/usr/bin/env bash
# GRPO against TRL's GRPOTrainer: same base, prompts, reward, group size, number of steps and machine.
#
#   benchmarks/vs_trl.sh FOLDER MODEL [--seeds 0 1 2] [--steps 80]
#   benchmarks/vs_trl.sh FOLDER MODEL --setting smollm2 [--path GSM8K] [--seeds 0 1 2 3 4] [--steps 4]
#   benchmarks/vs_trl.sh FOLDER --functions       losses and advantages against TRL's own, on the same tensors
#
# FOLDER: for TRL's environment and all runs; runs that are already there are not repeated. MODEL: a CoLA model of the
# preset tiny, e.g. outputs/pretrain-tiny-seed0/model, or of smollm2-135m; both trainers start from its base.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 FOLDER MODEL [--setting tiny|smollm2] [--seeds 0 1 2] [--steps 80], or $0 FOLDER --functions;" \
        "the top of this file explains them" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
model=$2
shift 2
if [ ! -x "$folder/trl/bin/python" ]; then
    "$root/.venv/bin/python" -m venv "$folder/trl"
    links=$("$root/.venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)
    if [ -n "$links" ]; then export UV_FIND_LINKS=$links; else export UV_TORCH_BACKEND=cpu; fi
    torch=$("$root/.venv/bin/python" -c 'import torch; print(torch.__version__)')
    # TRL, and what our task needs for its problems and rewards.
    "$root/.venv/bin/uv" pip install -q --python "$folder/trl/bin/python" \
        trl==1.16.0 "torch==$torch" pydantic wrapt reasoning-gym math-verify xxhash
fi
if [ "$model" = --functions ]; then
    PYTHONPATH=$root exec "$folder/trl/bin/python" "$root/benchmarks/trl_functions.py"
fi
exec "$root/.venv/bin/python" "$root/benchmarks/vs_trl.py" --folder "$folder" --model "$model" "$@"
