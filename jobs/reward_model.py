"""`cola_ray reward-model` as a file, for `ray job submit -- python jobs/reward_model.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("reward-model")
