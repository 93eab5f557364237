"""A reward model from preference pairs: a sequence classifier on a Llama, Bradley-Terry loss, ZeRO-3.

Examples:
    python jobs/reward_model.py --task.path pairs.jsonl --model.path outputs/pretrain-tiny-seed0/model
    python jobs/reward_model.py --preset llama-3.1-8b --task.path org/pairs --model.base meta-llama/Llama-3.2-1B

pairs.jsonl has the columns prompt, chosen and rejected. The result, outputs/reward_model-.../model, is what
jobs/rl_preference.py takes as --task.reward-model.
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("reward_model", __doc__)
