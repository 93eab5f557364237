"""Latent pre-training: discover actions (IDM, codebook, world model), clone the policy, optionally fine-tune the base.

Examples:
    python jobs/pretrain.py --preset tiny
    python jobs/pretrain.py --preset smollm2-135m --data.path DATA/train.jsonl --pretrain.max-steps 5
    python jobs/pretrain.py --preset llama-3.1-8b --data.path org/corpus --pretrain.stages actions policy
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("pretrain", __doc__)
