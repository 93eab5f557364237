"""`cola_ray pretrain` as a file, for `ray job submit -- python jobs/pretrain.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("pretrain")
