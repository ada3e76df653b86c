"""`hebatron info`."""

from __future__ import annotations

from pathlib import Path

from hebatron.spelling import did_you_mean
from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    info = add_verb(group, "info", run, "layers, parameters and memory of a model")
    info.add_argument("model", metavar="PATH|PRESET", help="a folder or config.json, or a preset's name")
    info.add_argument("--context", type=int, default=65536, help="tokens of context for the memory figures")


def run(arguments: Arguments) -> int:
    from hebatron.config import ModelConfig
    from hebatron.presets import PRESETS
    from hebatron.sizes import describe

    if arguments.model in PRESETS:
        config = PRESETS[arguments.model]()
    elif Path(arguments.model).exists():
        config = ModelConfig.load(arguments.model)
    else:
        raise ValueError(
            f"info: PATH|PRESET must be an existing path or one of {', '.join(PRESETS)}, "
            f"got {arguments.model}{did_you_mean(arguments.model, PRESETS)}"
        )
    print(describe(config, arguments.context))
    return 0
