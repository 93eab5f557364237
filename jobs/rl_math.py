"""RL with verifiable rewards in the latent action space: vLLM rollouts, ZeRO-3 learner, MLflow, one command.

Examples:
    python jobs/rl_math.py --preset tiny                      (makes its own base and latent model first)
    python jobs/rl_math.py --preset tiny --rl.kl-coef 0.01 --seed 1
    python jobs/rl_math.py --preset smollm2-135m --task.name gsm8k --task.path DATA/gsm8k --rl.max-steps 2
    python jobs/rl_math.py --preset tiny --resume             (continue from the last checkpoint)
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("rl_math", __doc__)
