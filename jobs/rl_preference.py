"""`cola_ray preference` as a file, for `ray job submit -- python jobs/rl_preference.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("preference")
