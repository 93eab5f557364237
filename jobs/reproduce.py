"""The papers' matrix in one command: pre-training, RL latent and token, KL sweep, Countdown, agents, search, studies.

Examples:
    python jobs/reproduce.py --preset tiny                    (under three hours on two cores; `make evals` first)
    python jobs/reproduce.py --preset smollm2-135m --task.path DATA/gsm8k --data.path DATA/gsm8k/train.jsonl
    python jobs/reproduce.py --preset tiny --reproduce.stages agent_archer agent_ppo        (and what they need)
    python jobs/reproduce.py --preset llama-3.1-8b --cluster.address http://HEAD:8265 --reproduce.parallel 2

Leaves report/index.html and report/report.md. The same command again goes on after a stop: stages that are done are
skipped. Each stage is a Ray job; stages/NAME has its log, and `cola_ray status stages/NAME` says how it is doing.
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("reproduce", __doc__)
