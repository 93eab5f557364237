"""What CoLA kept of its base: both on tasks of EleutherAI's evaluation harness.

Examples:
    python jobs/capabilities.py --model.path MODEL --harness.tasks mmlu gsm8k
    python jobs/capabilities.py --model.path MODEL --harness.tasks mine --harness.include-path my_tasks

Needs the packages of `make evals`. The harness's own command also knows the model:
    lm_eval --model cola_ray --model_args pretrained=MODEL,likelihood=marginal --tasks arc_easy
after `import cola_ray.studies.harness`.
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("capabilities", __doc__)
