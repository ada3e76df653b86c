"""`hebatron generate`."""

from __future__ import annotations

import sys
from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb, open_model, seed


def register(group: VerbGroup) -> None:
    generate = add_verb(group, "generate", run, "continue a prompt")
    generate.add_argument("model", metavar="RUN|MODEL", type=Path, help="a run or model folder")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, default=128, help="the most it writes")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=int, help="draw among the K likeliest tokens alone")
    generate.add_argument("--top-p", type=float, help="draw among the likeliest tokens that share P")
    generate.add_argument("--seed", type=seed, default=0, help="of what is drawn")


def run(arguments: Arguments) -> int:
    import torch

    from hebatron.training.metrics import printable

    model, tokenizer, _ = open_model(arguments.model)
    ids = tokenizer.encode(arguments.prompt)
    if not ids:
        raise ValueError(f"generate: PROMPT must hold at least one token, got {arguments.prompt!r}")
    out = model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    text = tokenizer.decode(out[0].tolist())
    print(printable(text) if sys.stdout.isatty() else text)  # a file gets what the model wrote
    return 0
