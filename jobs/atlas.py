"""What each latent action does: usage, typical tokens, texts that one action steers; an HTML page.

Examples:
    python jobs/atlas.py --preset tiny --model.path outputs/demo/model
    python jobs/atlas.py --preset smollm2-135m --model.path MODEL --data.path DATA/gsm8k/test.jsonl
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("atlas", __doc__)
