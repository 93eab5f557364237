"""Sweep a setting under Ray Tune, each run a whole RL training: what is reached against how far the policy goes.

Examples:
    python jobs/sweep_kl.py --preset tiny                     (kl_coef 0, 0.001, 0.01, 0.1 x 2 seeds)
    python jobs/sweep_kl.py --preset tiny --sweep.field rl.lr --sweep.values 1e-4 5e-4 --sweep.seeds 0 1 2
    python jobs/sweep_kl.py --preset tiny --sweep.asha --sweep.parallel 2
    python jobs/sweep_kl.py --preset tiny --resume            (go on after a stop or a kill)
    python jobs/sweep_kl.py --task.name twenty_questions      (agents)
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("sweep", __doc__)
