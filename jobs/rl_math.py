"""`cola_ray rl` as a file, for `ray job submit -- python jobs/rl_math.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("rl")
