"""`cola_ray agent` as a file, for `ray job submit -- python jobs/rl_agent.py ...`."""

from cola_ray.cli import main

if __name__ == "__main__":
    main("agent")
