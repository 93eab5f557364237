"""`cola_ray capabilities` as a file, for `ray job submit -- python jobs/capabilities.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("capabilities")
