"""Q of latent actions for MCTS-Q: double Q-learning on a head over the frozen base, from logged answers.

Examples:
    python jobs/evaluate.py --model.path MODEL --eval.split train --eval.ways sample --eval.problems 4096 \\
        --output-dir outputs/log
    python jobs/train_q.py --model.path MODEL --data.path outputs/log/predictions/sample
    python jobs/evaluate.py --model.path MODEL --eval.ways mcts_q --q.path outputs/train_q-tiny-seed0/model
"""

from cola_ray.command_line import main

if __name__ == "__main__":
    main("train_q", __doc__)
