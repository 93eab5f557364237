"""Evaluate a CoLA model on a task with a verifier: greedily, by samples (pass@k, majority), by beam and by tree search.

Examples:
    python jobs/evaluate.py --preset tiny --model.path outputs/demo/model
    python jobs/evaluate.py --eval.ways sample mcts --search.simulations 64 --eval.problems 512
    python jobs/evaluate.py --task.name gsm8k --task.path DATA/gsm8k --model.path MODEL --rollout.num-workers 8
    python jobs/evaluate.py --task.name twenty_questions --model.path outputs/demo-agent/model
    python jobs/evaluate.py --resume                          (answers only what has no prediction yet)

Predictions are Parquet, a row a problem: question, responses, actions, rewards, answers; of environments a row a seed:
transcripts, returns, turns, actions.
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("evaluate", __doc__)
