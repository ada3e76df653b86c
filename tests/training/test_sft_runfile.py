"""Run files with an [sft] section: what they print and train, and what is refused with the place named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_toy import chat_config, write_chats
from toy import toy_train

from hebatron.cli import main
from hebatron.tokenizer import train_bpe
from hebatron.training.run import open_run
from hebatron.training.runconfig import config_hash, load_run_config
from hebatron.training.sections import RunConfig

pytest.importorskip("jinja2")
EXAMPLE = Path(__file__).parents[2] / "examples" / "sft.toml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder)
    return folder


def test_plan_verb_prints_rows_masks_steps_and_time(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        f'run_dir = "{tmp_path}/run"\n[model]\npreset = "tiny"\n[data]\ntokenizer = "{root}/tok"\n'
        f'[sft]\nchats = ["{root}/chats.jsonl"]\nseq_len = 128\n[training]\ntokens_per_batch = 256\n',
        encoding="utf-8",
    )
    assert (
        main(
            [
                "plan",
                str(path),
                "--tokens-per-s",
                "10",
                "--sft.epochs",
                "2",
                "--sft.task-weights",
                "word",
                "0",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    data = open_run(load_run_config(path, ["--sft.epochs", "2", "--sft.task-weights", "word", "0"])).chats
    assert data is not None
    told = data.rows.describe()
    assert lines[: len(data.lines())] == data.lines() and "61 read, 60 used" in lines[0]
    assert f"rows: {told['rows']} of 128 tokens" in lines[1]
    assert any(line.startswith("task/count") and line.endswith("%") for line in lines)
    assert not any(line.startswith("task/word") for line in lines)
    assert any(line.startswith(f"steps: {-(-told['rows'] // 2)} of up to 256 tokens") for line in lines)
    seconds = round(told["groups"]["all"]["tokens"] / 10)
    assert f"time: {seconds // 60}:{seconds % 60:02d} at 10 tokens/s" in lines[-1]


def test_example_run_file_trains(root: Path, tmp_path: Path) -> None:
    overrides = [
        *("--run-dir", str(tmp_path / "run"), "--data.tokenizer", str(root / "tok")),
        *("--data.corpora.0.path", str(root / "en"), "--data.held-out-permille", "150"),
        *("--data.held-out-tokens", "60", "--sft.chats", str(root / "chats.jsonl"), "--sft.seq-len", "128"),
        *("--training.tokens-per-batch", "1024", "--training.tokens-per-microbatch", "1024"),
        *("--training.sample-tokens", "2", "--model.path", str(tmp_path / "base")),
    ]
    fresh = chat_config(root, tmp_path)
    open_run(fresh).model.save_pretrained(tmp_path / "base")
    result = toy_train(load_run_config(EXAMPLE, overrides))
    assert result.finished and "all" in result.chat_loss


def bad(root: Path, tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "run.toml"
    head = f'[model]\npreset = "tiny"\n[data]\ntokenizer = "{root}/tok"\n'
    path.write_text(head + text.format(root=root), encoding="utf-8")
    return load_run_config(path)


SFT = '[sft]\nchats = ["{root}/chats.jsonl"]\nseq_len = 128\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run file must have phases or \\[sft\\], got neither"),
        (
            SFT + '[[phases]]\nname = "a"\ntokens = 9\nseq_len = 4\nsources = {{ he = 1 }}',
            r"phases must not be given with \[sft\], got",
        ),
        (SFT + "[anchor]\nhe = 1", r"anchor must not be given with \[sft\], got \{'he': 1.0\}"),
        (
            SFT + "[schedule]\nphase_warmup_steps = 5",
            r"schedule.phase_warmup_steps must be 0 with \[sft\], which has no phases, got 5",
        ),
        (SFT + "epochs = 0", "sft.epochs must be > 0, got 0"),
        (SFT + "epoch = 1", "sft.epoch must be one of .*; did you mean 'epochs'"),
        (SFT + 'truncation = "trim"', "sft.truncation must be one of drop, cut, got 'trim'"),
        (SFT + "neftune_alpha = -1", r"sft.neftune_alpha must be >= 0, got -1"),
        (SFT + "held_out_permille = 1000", r"sft.held_out_permille must be in \[0, 1000\), got 1000"),
        ("[sft]\nchats = []\nseq_len = 8", "sft.chats must be not empty"),
        ('[sft]\nchats = ["a"]', "sft.seq_len must be given, got nothing"),
        ('[sft]\nchats = ["a"]\nseq_len = 8192', "sft.seq_len must be at most .* 4096, got 8192"),
    ],
)
def test_run_files_with_wrong_chats_are_refused(root: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad(root, tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SFT.replace("chats.jsonl", "none.jsonl"),
            r"input must be a .jsonl or .jsonl.zst file, got .*none.jsonl",
        ),
        (SFT + 'template = "x.jinja"', "template must be nemotron3 or a file, got 'x.jinja'"),
        (
            SFT + "[sft.task_weights]\nwrod = 2",
            "task_weights must name one of colour, count, word, got 'wrod'",
        ),
        (SFT.replace("128", "4"), r"sft.chats must leave a chat to train on, got 61 read, .*'too long': 6\d"),
        (SFT.replace("128", "2048"), "sft seq_len must be at most the model's .* 1024, got 2048"),
    ],
)
def test_runs_over_wrong_chats_are_refused(root: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_run(bad(root, tmp_path, text))


def test_a_weight_of_what_is_wholly_held_out_says_so(root: Path, tmp_path: Path) -> None:
    """Twenty tasks of one chat and twenty of two, half of the chats held out."""
    chats = [(f"t{i}", f"q{i}.{k}") for i in range(40) for k in range(1 + i % 2)]
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "a"}], "task": task}
        for task, q in chats
    ]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    options: dict[str, Any] = {"chats": (tmp_path / "chats.jsonl",), "held_out_permille": 500}
    data = open_run(chat_config(root, tmp_path, **options)).chats
    assert data is not None
    gone = {task for task, _ in chats} - {sample.task for sample in data.rows.samples}
    for odd, count in ((0, "is its one chat"), (1, "are all 2 chats of it")):
        task = min(task for task in gone if int(task[1:]) % 2 == odd)
        message = f"sft.task_weights must name what is trained on, got '{task}': held out by .* {count}"
        with pytest.raises(ValueError, match=message):
            open_run(chat_config(root, tmp_path, **options, task_weights={task: 2.0}))
    kept = min(sample.task for sample in data.rows.samples)
    open_run(chat_config(root, tmp_path, **options, task_weights={kept: 2.0}))


def test_corpora_with_nothing_held_out_are_refused(root: Path, tmp_path: Path) -> None:
    config = chat_config(root, tmp_path)
    with pytest.raises(
        ValueError, match=r"data\.held_out_permille must be > 0 with \[sft\] and data\.corpora, got 0"
    ):
        toy_train(replace(config, data=replace(config.data, held_out_permille=0)))


def test_a_tokenizer_without_control_tokens_is_refused_saying_how_to_get_them(
    root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    train_bpe(["a b"], 300).save(folder)
    spec = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|im_end|>", "<|other|>")
    (folder / "tokenizer.json").write_text(spec, encoding="utf-8")
    config = chat_config(root, tmp_path)
    with pytest.raises(
        ValueError, match=r"got '<\|im_end\|>\\n' behind it; a tokenizer that `hebatron data prepare"
    ):
        open_run(replace(config, data=replace(config.data, tokenizer=folder)))


def test_hash_covers_what_changes_the_weights(root: Path, tmp_path: Path) -> None:
    config = chat_config(root, tmp_path)
    assert config.sft is not None
    moved = replace(config, sft=replace(config.sft, chats=(Path("elsewhere.jsonl"),)))
    assert config_hash(moved) == config_hash(config)  # the plan's hash covers the chats
    for change in ({"epochs": 2}, {"neftune_alpha": 1.0}, {"lang_weights": {"he": 2.0}}):
        assert config_hash(replace(config, sft=replace(config.sft, **change))) != config_hash(config)
