"""RL of a multi-turn agent in the latent action space: ArCHer's off-policy utterance critic over whole turns.

Examples:
    python jobs/rl_agent.py                                   (Twenty Questions; makes its own cloned policy first)
    python jobs/rl_agent.py --rl.algorithm filtered_bc --seed 1
    python jobs/rl_agent.py --rl.algorithm grpo --rl.group-size 8 --rl.prompts-per-step 8
    python jobs/rl_agent.py --task.name guess_city --resume
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("rl_agent", __doc__)
