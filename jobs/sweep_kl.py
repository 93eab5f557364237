"""`cola_ray sweep` as a file, for `ray job submit -- python jobs/sweep_kl.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("sweep")
