"""Fix one latent action and watch the text: each action in turn after one prompt, then the policy's own choice.

python examples/steer.py MODEL "3 + 4 =" [--new-tokens 8] [--actions 0 5 9]
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from cola_ray import CoLAForCausalLM
from cola_ray.tasks.chat import ChatTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="directory of a CoLA model")
    parser.add_argument("prompt")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--actions", type=int, nargs="+", help="default: all actions")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = CoLAForCausalLM.from_pretrained(args.model).eval()
    prompt = torch.tensor([ChatTokenizer(tokenizer, "").prompt_ids(args.prompt)])
    actions = args.actions or list(range(model.config.num_actions))
    forced = torch.tensor([[action] * args.new_tokens for action in actions] + [[-1] * args.new_tokens])
    tokens, _, _ = model.generate_latent(
        prompt.expand(len(forced), -1), max_new_tokens=args.new_tokens, temperature=0.0, actions=forced
    )
    table = Table("action", "text", title=repr(args.prompt))
    for name, row in zip([*map(str, actions), "policy"], tokens, strict=True):
        table.add_row(name, repr(tokenizer.decode(row)))
    Console().print(table)


if __name__ == "__main__":
    main()
