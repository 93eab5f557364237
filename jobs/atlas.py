"""`cola_ray atlas` as a file, for `ray job submit -- python jobs/atlas.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("atlas")
