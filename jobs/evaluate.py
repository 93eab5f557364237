"""`cola_ray evaluate` as a file, for `ray job submit -- python jobs/evaluate.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("evaluate")
