"""Search over latent actions: right answers against generated tokens, and the tokens that the prefix cache saves.

python benchmarks/search.py --folder outputs/search --model MODEL [--budgets 2 4 8 16 32] [--problems 512]

MODEL was trained by RL. The Q of MCTS-Q is learnt from the model's samples on training problems. All ways of answering
use the same verifier to choose among the same number of responses. Saved tokens are counted in the engine: tokens that
a search computed, against computing the whole text again in every simulation.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cached_run import run_once
from record import RESULTS, record

from cola_ray.rollout.batching import RunningBatch
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.rollout.search import SearchProblem, TreeSearch
from cola_ray.settings.config import SearchConfig

WAYS = ("sample", "beam", "mcts", "mcts_q")


def plot(
    curves: dict[str, list[tuple[float, float, float, float]]], points: dict[str, tuple[float, float]], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for way, curve in curves.items():
        tokens, right, low, high = map(np.array, zip(*curve, strict=True))
        axes.errorbar(tokens, right, (right - low, high - right), marker="o", markersize=4, capsize=2, label=way)
    for way, (tokens, right) in points.items():
        axes.plot(tokens, right, "k*" if way == "greedy" else "kx", label=way)
    axes.set(xscale="log", xlabel="tokens generated a problem", ylabel="problems with a right answer found")
    axes.set_title("search after RL, tiny preset")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def saved_tokens(model: Path, simulations: int = 64, new_tokens: int = 16) -> dict[str, float]:
    """By prompt length, the tokens of all simulated texts divided by the tokens that the engine computed."""
    engine = LatentEngine(str(model), dtype="float32", max_model_len=512, stop_token_ids=[1], kv_cache_mb=128)
    batch = RunningBatch(engine, drain=True)
    draw, vocabulary = np.random.default_rng(0), engine.llm.llm_engine.model_config.hf_config.vocab_size
    ratios = {}

    async def score(responses: Sequence[np.ndarray]) -> list[float]:
        return draw.random(len(responses)).tolist()

    def request(ids: Sequence[int], seed: int, actions: Sequence[int], budget: int) -> Request:
        return Request(ids, seed, 1.0, 0, budget, actions)

    for length in (64, 128, 256, 448):
        prompt = draw.integers(2, vocabulary // 2, length).tolist()
        config = SearchConfig(simulations=simulations, depth=new_tokens)
        search = TreeSearch(config, SearchProblem(prompt, new_tokens, batch.complete, score, request))
        found = asyncio.run(search.run())
        whole = sum(length + len(response) for response in found.responses)
        ratios[f"saved_at_{length}_prompt_tokens"] = whole / found.computed_tokens
    engine.close()
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--problems", type=int, default=512)
    args = parser.parse_args()
    folder = args.folder.resolve()
    common = ["--preset", "tiny", "--task.name", args.task, "--model.path", str(args.model.resolve())]
    asked = [*common, "--eval.problems", str(args.problems), "--eval.chunk", "128"]
    wide = ["--search.root-breadth", "16", "--search.breadth", "16"]
    run_once(folder / "log", "evaluate", *common, "--eval.split", "train", "--eval.ways", "sample", "--eval.problems",
          "4096", "--eval.chunk", "512", "--search.simulations", "16")  # fmt: skip
    logged = folder / "log" / "outputs" / "run" / "predictions" / "sample"
    learnt = run_once(folder / "q", "train_q", *common, "--data.path", str(logged), "--pretrain.steps.q", "1500",
                   "--pretrain.batch-size", "256", "--cluster.learner-ranks", "1")  # fmt: skip
    with_q = ["--q.path", str(folder / "q" / "outputs" / "run" / "model")]
    single = run_once(folder / "greedy", "evaluate", *asked, "--eval.ways", "base", "greedy")
    curves: dict[str, list[tuple[float, float, float, float]]] = {way: [] for way in WAYS}
    figures: dict[str, object] = {f"{way}_right": single[way]["accuracy"] for way in ("base", "greedy")}
    figures |= {"q_heldout_loss": learnt["q_heldout_loss"], "q_heldout_correlation": learnt["q_heldout_correlation"]}
    for budget in args.budgets:
        where = folder / f"budget-{budget}"
        found = run_once(where, "evaluate", *asked, *wide, *with_q, "--eval.ways", *WAYS, "--search.simulations",
                      str(budget))  # fmt: skip
        for way in WAYS:
            of_way = found[way]
            best = [of_way[name] for name in ("best", "best_low", "best_high")]
            curves[way].append((of_way["generated_tokens"], *best))
            figures |= dict(zip((f"{way}_{budget}_{name}" for name in ("right", "low", "high")), best, strict=True))
            figures[f"{way}_{budget}_tokens"] = of_way["generated_tokens"]
    figures |= saved_tokens(args.model.resolve())
    points = {way: (single[way]["generated_tokens"], single[way]["accuracy"]) for way in ("base", "greedy")}
    plot(curves, points, RESULTS / "search.png")
    about = f"Right answers found on {args.problems} held-out problems of {args.task}, by budget of responses"
    record("search", figures, [0], f"{about}; curves over tokens in docs/results/search.png.")


if __name__ == "__main__":
    main()
