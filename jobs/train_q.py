"""`cola_ray train-q` as a file, for `ray job submit -- python jobs/train_q.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("train-q")
