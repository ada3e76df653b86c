"""A run over chats small enough to repeat dozens of times: three tasks in two languages, with something to learn."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from toy import WORDS, toy_config, write_corpora

from hebatron.training.runconfig import check_run_config
from hebatron.training.sections import RunConfig, SftConfig

ANSWERS = {"count": "שלוש מילים", "colour": "blue", "word": "ספר"}


def write_chats(root: Path) -> None:
    """root/chats.jsonl beside the toy's corpora: 60 chats of one turn, every tenth of two, one without an answer."""
    write_corpora(root)
    rng = random.Random(1)
    lines = []
    for i in range(60):
        task = ("count", "colour", "word")[i % 3]
        question = " ".join(rng.choices(WORDS, k=rng.randrange(2, 5))) + f" {i}?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWERS[task]}]
        if i % 10 == 0:
            messages += [{"role": "user", "content": "עוד"}, {"role": "assistant", "content": "לא"}]
        lines.append({"messages": messages, "task": task, "lang": "en" if task == "colour" else "he"})
    lines.append({"messages": [{"role": "user", "content": "בלי תשובה"}], "task": "word", "lang": "he"})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (root / "chats.jsonl").write_text(text, encoding="utf-8")


def chat_config(root: Path, run_dir: Path, training: dict[str, Any] | None = None, **sft: Any) -> RunConfig:
    """Some 10 steps of two rows of 128 tokens; the toy's corpora are there to be forgotten."""
    plain = toy_config(root, run_dir, tokens_per_batch=256, tokens_per_microbatch=128, eval_every=4)
    section = SftConfig((root / "chats.jsonl",), 128, held_out_permille=150)
    config = replace(
        plain,
        phases=(),
        anchor={},
        sft=replace(section, **sft),
        training=replace(plain.training, **(training or {})),
        schedule=replace(plain.schedule, phase_warmup_steps=0),
    )
    check_run_config(config)
    return config
