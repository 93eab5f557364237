"""``python -m cola_ray``: the command ``cola_ray``."""

from cola_ray.cli import main

if __name__ == "__main__":
    main()
