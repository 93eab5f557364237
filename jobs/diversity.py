"""`cola_ray diversity` as a file, for `ray job submit -- python jobs/diversity.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("diversity")
