"""RL from preferences: prompts without a verifier, scored by a reward model on an actor of its own or by an endpoint.

Examples:
    python jobs/rl_preference.py --task.path pairs.jsonl --task.reward-model outputs/reward_model-tiny-seed0/model
    python jobs/rl_preference.py --task.path org/prompts --task.reward-model http://scores:8000/ --rl.kl-coef 0.01
    python jobs/rl_preference.py --task.path pairs.jsonl --task.reward-model org/model --rl.action-space token

pairs.jsonl has a column prompt; chosen, where it is there, is what the first policy is cloned from.
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("rl_preference", __doc__)
