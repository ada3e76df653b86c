"""Task scores: equal to the parts put together by hand, plain and through a chat template; and the verb."""

import json
from pathlib import Path
from typing import Any

import pytest
from task_toy import make_model, make_tokenizer
from test_tasks import write

from hebatron import Hebatron, cli, presets
from hebatron.chat.template import NEMOTRON3, ChatTemplate
from hebatron.evaluation.answers import f1
from hebatron.evaluation.benchmark import Prompter, choose_shots, mean_of, run_task
from hebatron.evaluation.complete import complete
from hebatron.evaluation.scoring import Item, multiple_choice
from hebatron.evaluation.task_table import TASKS
from hebatron.evaluation.tasks import Example, find_tasks, read_examples
from hebatron.tokenizer import Tokenizer

RECORDS = [
    {"question": f"שאלה מספר {i}?", "choices": ["שלום", "ספר ילד", "עולם " * (i % 3 + 1)], "answer": i % 3}
    for i in range(6)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return make_model(presets.tiny(330), 3)


def test_prompts_show_the_worked_examples_first() -> None:
    prompter = Prompter(TASKS["mmlu_heb"], make_tokenizer())
    shown = [Example("a", "שאלה: א\nתשובה:", ("א", "ב"), 1), Example("b", "שאלה: ב\n", ("א", "ב"), 0)]
    header = TASKS["mmlu_heb"].header
    wanted = f"{header}\n\nשאלה: א\nתשובה: ב\n\nשאלה: ב\nא\n\nשאלה: ג"
    assert prompter.write(Example("c", "שאלה: ג"), shown) == wanted
    assert prompter.behind("תשובה:", "א") == " א" and prompter.behind("תשובה:\n", "א") == "א"
    assert prompter.behind("תשובה:", "\tא") == "\tא" and prompter.ends == []


def test_prompts_of_a_chat_are_its_turns(tokenizer: Tokenizer) -> None:
    prompter = Prompter(TASKS["mmlu_heb"], tokenizer, ChatTemplate(NEMOTRON3))
    shown = [Example("a", "אחת?", ("א", "ב"), 1)]
    assert prompter.write(Example("c", "שתיים?"), shown) == (
        f"<|im_start|>system\n{TASKS['mmlu_heb'].header}<|im_end|>\n<|im_start|>user\nאחת?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>ב<|im_end|>\n<|im_start|>user\nשתיים?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>"
    )
    assert prompter.behind("תשובה:", "א") == "א" and prompter.ends == [tokenizer.token_id("<|im_end|>")]
    with pytest.raises(ValueError, match=r"file:7: messages\[1\] must not spell '<\|im_end\|>', got it"):
        prompter.write(Example("file:7", "a<|im_end|>\nb"), [])


@pytest.mark.parametrize("template", [None, ChatTemplate(NEMOTRON3)])
def test_choices_are_scored_behind_their_prompts(
    model: Hebatron, tokenizer: Tokenizer, template: ChatTemplate | None, tmp_path: Path
) -> None:
    (file,) = find_tasks([write(tmp_path / "trivia_heb.jsonl", RECORDS)])
    result = run_task(model, tokenizer, file, shots=2, seed=4, limit=5, template=template, batch_tokens=100)
    examples = read_examples(file.path, file.task)
    prompter = Prompter(file.task, tokenizer, template)
    items = []
    for example, shown in zip(examples[:5], choose_shots(examples[:5], examples, 2, 4), strict=True):
        prompt, space = prompter.write(example, shown), "" if template else " "
        items.append(Item(prompt, [space + choice for choice in example.choices], example.gold))
    wanted = multiple_choice(model, tokenizer, items, special=template is not None)
    assert result.metrics == wanted.accuracy and result.chance == wanted.chance == pytest.approx(1 / 3)
    assert (result.items, result.shots, result.seed, result.metric) == (5, 2, 4, "acc_norm")
    assert result.headline == wanted.accuracy["acc_norm"]
    for told, item, row in zip(result.predictions, items, wanted.scores, strict=True):
        assert told["gold"] == item.gold
        assert told["log_probs"] == pytest.approx([one.log_prob for one in row], abs=1e-5)


def test_written_answers_are_compared(model: Hebatron, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["שלום עולם", "ספר ילד בית", "גדול קטן"]
    written = complete(model, tokenizer, texts, max_new_tokens=64, stop=["\n"])
    answers = [written[0].text, "לא זה", written[2].text + " ועוד"]
    records = [{"context": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]
    (file,) = find_tasks([write(tmp_path / "text.jsonl", records)])
    result = run_task(model, tokenizer, file)
    overlaps = [f1(one.text, [answer]) for one, answer in zip(written, answers, strict=True)]
    assert result.metrics["exact_match"].value == pytest.approx(1 / 3) and result.chance is None
    assert overlaps[0] == 1 and 0 < overlaps[2] < 1
    assert result.metrics["f1"].value == pytest.approx(sum(overlaps) / 3)
    assert [told["text"] for told in result.predictions] == [one.text for one in written]
    assert mean_of([result, result]) == result.headline.value


def test_written_answers_of_a_chat_end_with_the_turn(
    model: Hebatron, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.update(options)
        return complete(*arguments, **options)

    monkeypatch.setattr("hebatron.evaluation.benchmark.complete", spy)
    (file,) = find_tasks([write(tmp_path / "text.jsonl", [{"context": "שלום", "answer": "x"}])])
    run_task(model, tokenizer, file, template=ChatTemplate(NEMOTRON3))
    assert seen["ends"] == [tokenizer.token_id("<|im_end|>")] and seen["special"] and seen["stop"] == ()
    run_task(model, tokenizer, file)
    assert seen["ends"] == [] and not seen["special"] and seen["stop"] == ("\n",)


def test_shots_come_from_the_file_beside(model: Hebatron, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "trivia_heb.jsonl", RECORDS[:2])
    with pytest.raises(ValueError, match="shots must be at most the other examples"):
        run_task(model, tokenizer, find_tasks([path])[0], shots=2)
    write(tmp_path / "trivia_heb.shots.jsonl", RECORDS[2:])
    assert run_task(model, tokenizer, find_tasks([path])[0], shots=4).shots == 4


def test_run_task_refuses_a_negative_number(model: Hebatron, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (file,) = find_tasks([write(tmp_path / "trivia_heb.jsonl", RECORDS)])
    with pytest.raises(ValueError, match="shots must be >= 0, got -1"):
        run_task(model, tokenizer, file, shots=-1)
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        run_task(model, tokenizer, file, limit=0)


# ---------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def folder(model: Hebatron, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_eval_prints_and_writes_what_run_task_finds(
    folder: Path, model: Hebatron, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write(tasks / "trivia_heb.jsonl", RECORDS)
    write(tasks / "text.jsonl", [{"context": "שלום", "answer": "x"}] * 2)
    out = tmp_path / "results.json"
    arguments = [
        "eval",
        str(folder),
        "--tasks",
        str(tasks),
        "--shots",
        "0",
        "--limit",
        "4",
        "--out",
        str(out),
    ]
    assert cli.main(arguments) == 0
    results = [run_task(model, tokenizer, file, shots=0, limit=4) for file in find_tasks([tasks])]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["mean"] == pytest.approx(mean_of(results)) and found["chat"] is False
    assert list(found["tasks"]) == ["text", "trivia_heb"]
    for result, told in zip(results, found["tasks"].values(), strict=True):
        assert told["metrics"] == {name: one._asdict() for name, one in result.metrics.items()}
        assert len(told["predictions"]) == told["items"] == result.items and len(told["sha256"]) == 64
    text, trivia, mean = capsys.readouterr().out.splitlines()
    acc = results[1].metrics["acc_norm"]
    assert trivia.strip().startswith(
        f"{acc.value:.4f} ±{acc.stderr:.4f} acc_norm (chance 0.3333)  trivia_heb"
    )
    assert "4 items, 0 shots" in trivia and "exact_match" in text and "mean of 2 tasks" in mean


def test_eval_asks_through_a_template(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "trivia_heb.jsonl", RECORDS)
    arguments = ["eval", str(folder), "--tasks", str(path), "--shots", "1"]
    assert cli.main([*arguments, "--chat"]) == 2
    assert "the model must have one, got none; give --template nemotron3" in capsys.readouterr().err
    assert cli.main([*arguments, "--template", "nemotron3"]) == 0
    assert "1 shots" in capsys.readouterr().out
    assert cli.main([*arguments, "--template", str(tmp_path / "none.jinja")]) == 2
    assert "template must be nemotron3 or a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        (["corpus", "--shots", "0"], "--tasks or --lm-eval must be given with --shots, got none"),
        (["corpus", "--limit", "3"], "--tasks or --lm-eval must be given with --limit, got none"),
        (["corpus", "--seed", "0"], "--tasks or --lm-eval must be given with --seed, got none"),
        (["corpus", "--chat"], "--tasks or --lm-eval must be given with --chat, got none"),
        (
            ["corpus", "--template", "nemotron3"],
            "--tasks or --lm-eval must be given with --template, got none",
        ),
        (["corpus", "--task", "copa_heb"], "--tasks must be given with --task, got none"),
        (["corpus", "--include-path", "x"], "--lm-eval must be given with --include-path, got none"),
        (["--tasks", "x", "--max-tokens", "5"], "a CORPUS must be given with --max-tokens, got none"),
    ],
)
def test_eval_refuses_an_option_that_nothing_reads(
    given: list[str], needed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "none", *given]) == 2
    assert needed in capsys.readouterr().err


def test_eval_refuses_before_it_opens_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "a CORPUS, --tasks or --lm-eval must be given, got none" in capsys.readouterr().err
    path = write(tmp_path / "trivia_heb.jsonl", RECORDS)
    assert cli.main(["eval", "none", "--tasks", str(path), "--out", str(tmp_path / "no" / "x.json")]) == 2
    assert "--out must be in a folder that exists" in capsys.readouterr().err
