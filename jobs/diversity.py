"""How different are texts that latent actions make, against the base's own samples and against random tokens?

Examples:
    python jobs/diversity.py --preset tiny --model.path outputs/demo/model
    python jobs/diversity.py --preset smollm2-135m --model.path MODEL --data.path DATA/gsm8k/test.jsonl
    python jobs/diversity.py --model.path MODEL --data.path texts.jsonl --diversity.encoder BAAI/bge-m3

Needs the packages of `make evals`. Texts are kept as Parquet.
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("diversity", __doc__)
