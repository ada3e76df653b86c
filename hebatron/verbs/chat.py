"""`hebatron chat`."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from hebatron.verbs import Arguments, VerbGroup, add_verb, open_model, seed

if TYPE_CHECKING:
    from hebatron.chat.conversation import Conversation

HELP = "/reset forgets what was said, /exit or end of input leaves, Ctrl-C stops an answer"


def register(group: VerbGroup) -> None:
    chat = add_verb(group, "chat", run, "talk to a model, answers as they are written")
    chat.add_argument("model", metavar="RUN|MODEL", type=Path, help="a run or model folder")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before everything else")
    chat.add_argument("--template", metavar="NAME|FILE", help="nemotron3, or Jinja; default: the model's own")
    chat.add_argument("--thinking", action="store_true", help="ask for reasoning before each answer")
    chat.add_argument("--max-new-tokens", type=int, default=1024, help="of one answer")
    chat.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    chat.add_argument("--top-k", type=int, help="draw among the K likeliest tokens alone")
    chat.add_argument("--top-p", type=float, default=0.9, help="draw among the likeliest tokens that share P")
    chat.add_argument("--seed", type=seed, default=0, help="of what is drawn")


def run(arguments: Arguments) -> int:
    from hebatron.chat.conversation import Conversation
    from hebatron.chat.template import open_template

    model, tokenizer, _ = open_model(arguments.model)
    conversation = Conversation(
        model,
        tokenizer,
        open_template(arguments.template, tokenizer),
        system=arguments.system,
        thinking=arguments.thinking,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    # A name stands on a line of its own: a terminal orders a line by its first letter, and one that begins with a
    # Hebrew letter runs from the right. No marks or isolates are added.
    person = sys.stdin.isatty()
    if person:
        import readline  # noqa: F401  input() then edits lines

        print(HELP)
    while True:
        try:
            text = input("you:\n" if person else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if not person:
                raise
            print(f"\n{HELP}")
            continue
        if text == "/exit":
            return 0
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            print(HELP, file=sys.stderr)
        elif text:
            answer(conversation, text, person)


def answer(conversation: Conversation, text: str, person: bool) -> None:
    """Print the answer to one line as it comes."""
    from hebatron.training.metrics import printable, printable_name

    if person:
        print("model:")
    try:
        with closing(conversation.ask(text)) as pieces:
            for piece in pieces:
                print(printable(piece), end="", flush=True)
        print()
        if conversation.cut:
            print("(cut: the answer reached its length limit)", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    except ValueError as error:  # a text that cannot be said; the conversation goes on
        print(f"hebatron: {printable_name(str(error))}", file=sys.stderr)
