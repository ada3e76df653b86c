"""`hebatron export hf`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb, open_model


def register(group: VerbGroup) -> None:
    hub = add_verb(group, "hf", run, "write a folder that transformers and serving engines open")
    hub.add_argument("source", metavar="RUN|MODEL", type=Path, help="a run or model folder")
    hub.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    hub.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights written"
    )


def run(arguments: Arguments) -> int:
    import torch

    from hebatron.hub import export_hf

    model, _, tokenizer_folder = open_model(arguments.source)
    export_hf(model, tokenizer_folder, arguments.out, dtype=getattr(torch, arguments.dtype))
    print(f"{arguments.out}: open it with transformers' AutoModelForCausalLM and AutoTokenizer")
    return 0
