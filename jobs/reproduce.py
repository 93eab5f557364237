"""`cola_ray reproduce` as a file, for `ray job submit -- python jobs/reproduce.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("reproduce")
