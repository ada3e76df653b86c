"""From documents to a run by difficulty through the command line alone, with a model among the measures."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import toy_config, toy_train, write_corpora

from hebatron.cli import main
from hebatron.data.corpus import Corpus, read_index
from hebatron.data.corpus_parts import split_corpus
from hebatron.evaluation import evaluate
from hebatron.evaluation.evaluate import piece_bits

RUN_FILE = """
run_dir = "{root}/by-difficulty"
[model]
preset = "tiny"
[model.fields]
hidden_size = 32
[data]
tokenizer = "{root}/tok"
held_out_permille = 0
corpora = [{{ name = "easy", path = "{root}/parts/part-1" }}, {{ name = "hard", path = "{root}/parts/part-2" }}]
[[phases]]
name = "one"
tokens = 64
seq_len = 16
sources = {{ easy = 1 }}
[[phases]]
name = "two"
tokens = 64
seq_len = 16
sources = {{ hard = 1 }}
[training]
tokens_per_batch = 32
device = "cpu"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, and a run of which the model is taken."""
    root = tmp_path_factory.mktemp("root")
    write_corpora(root)
    toy_train(toy_config(root, root / "run"), stop_after=2)
    return root


def test_score_split_plan_and_train_by_the_command_line(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    he, parts = root / "he", root / "parts"
    score = ["data", "score", str(he), "--model", str(root / "run"), "--weight", "model_bits=2"]
    assert main([*score, "--plot", str(root / "scores.png")]) == 0, capsys.readouterr().err
    assert (root / "scores.png").read_bytes().startswith(b"\x89PNG")
    whole = Corpus.open(he)
    assert (whole.columns["model_bits"] > 0).all()
    assert main(["data", "split", str(he), "--shares", "1", "2", "--out", str(parts)]) == 0
    told = capsys.readouterr().out
    assert f"{parts}/part-2: " in told and " documents, " in told
    (root / "run.toml").write_text(RUN_FILE.format(root=root))
    assert main(["plan", str(root / "run.toml")]) == 0
    assert main(["train", str(root / "run.toml")]) == 0
    assert (root / "by-difficulty" / "final" / "model.safetensors").is_file()
    cuts = [Corpus.open(parts / f"part-{n}").columns["difficulty"] for n in (1, 2)]
    assert cuts[0].max() <= cuts[1].min() and len(cuts[0]) + len(cuts[1]) == len(whole)


def test_a_stopped_reading_goes_on_where_it_was(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a stopped `data score --model` has read is not read again, and the figures are those of one reading."""
    folder, begun = root / "en", []

    def stopping(*given: Any, stop: int | None, **options: Any) -> Iterator[Any]:
        begun.append(options["begin"])
        for piece in piece_bits(*given, **options):
            if piece[0] == stop:
                raise KeyboardInterrupt
            yield piece

    def score(stop: int | None, *more: str) -> int:
        monkeypatch.setattr(evaluate, "piece_bits", functools.partial(stopping, stop=stop))
        return main(["data", "score", str(folder), "--model", str(root / "run"), *more])

    assert score(None) == 0
    whole = Corpus.open(folder).columns
    assert not list(folder.glob(".model_bits-*"))
    assert score(7) == 130
    (kept,) = folder.glob(".model_bits-*")
    assert len(kept.read_text().splitlines()) == 6  # the seventh may have had another piece
    kept.write_text(kept.read_text() + "[6, [[1.0, 3")  # the process was killed while writing
    assert score(3, "--model-tokens", "5") == 130  # another request, which nothing was read for
    assert score(9) == 130
    capsys.readouterr()
    assert score(None) == 0
    told = capsys.readouterr().err.splitlines()
    assert begun == [0, 0, 0, 6, 8]
    assert told[0].startswith("model: 8 of 40 documents read (") and "100%" in told[-1]
    assert not kept.exists()
    again = Corpus.open(folder).columns
    assert {name: v.tolist() for name, v in again.items()} == {name: v.tolist() for name, v in whole.items()}


def test_split_keeps_every_document_once(root: Path, tmp_path: Path) -> None:
    assert main(["data", "score", str(root / "en"), "--tokenizer", str(root / "tok")]) == 0
    whole = Corpus.open(root / "en")
    parts = split_corpus(root / "en", tmp_path / "out", "rarity", [1, 1, 2])
    opened = [Corpus.open(part.folder) for part in parts]
    expected = {whole.hash(i): i for i in range(len(whole))}
    for part, corpus in zip(parts, opened, strict=True):
        assert (part.documents, part.tokens) == (len(corpus), corpus.num_tokens)
        assert part.low == corpus.columns["rarity"].min() and part.high == corpus.columns["rarity"].max()
        for i in range(len(corpus)):
            j = expected.pop(corpus.hash(i))
            assert corpus.tokens(i).tolist() == whole.tokens(j).tolist()
            assert (corpus.source(i), corpus.lang(i), corpus.id(i)) == ("en", "en", whole.id(j))
            assert corpus.byte_count(i) == whole.byte_count(j)
            assert {name: v[i] for name, v in corpus.columns.items()} == {
                name: v[j] for name, v in whole.columns.items()
            }
    assert not expected
    shares = np.array([part.tokens for part in parts]) / whole.num_tokens
    assert np.abs(shares - np.array([0.25, 0.25, 0.5])).max() <= whole.lengths.max() / whole.num_tokens
    origin = read_index(parts[1].folder)["origin"]
    assert origin == {"by": "rarity", "shares": [1, 1, 2], "part": 2, "corpus": whole.fingerprint}
    again = split_corpus(root / "en", tmp_path / "again", "rarity", [1, 1, 2])
    assert [Corpus.open(p.folder).fingerprint for p in again] == [c.fingerprint for c in opened]


def test_split_refuses_and_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    he, out = root / "he", tmp_path / "out"
    assert main(["data", "score", str(he), "--tokenizer", str(root / "tok")]) == 0
    for by, shares, message in [
        ("size", [1.0], r"--by must name a column of .*he \(difficulty, .*\), got 'size'"),
        ("difficulty", [1.0, 0.0], "weights must be one or more positive numbers"),
        ("difficulty", [1.0] * 99, "every part must hold a document, got none in part"),
    ]:
        with pytest.raises(ValueError, match=message):
            split_corpus(he, out, by, shares)
    monkeypatch.setattr("hebatron.data.corpus_parts.write_scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        split_corpus(he, out, "difficulty", [1.0, 1.0])
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ValueError, match="--out must be a new or empty folder, got"):
        split_corpus(he, out, "difficulty", [1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "data score: --tokenizer or --model must be given, got neither"),
        (["--tokenizer", "tok", "--model-tokens", "5"], "data score: --model must be given, got neither"),
        (["--tokenizer", "tok", "--phases", "0"], "--phases must be at least 1, got 0"),
        (["--tokenizer", "tok", "--weight", "mattr"], "--weight must be MEASURE=NUMBER, got 'mattr'"),
        (
            ["--tokenizer", "tok", "--weight", "model_bits=1"],
            "weights must name one of rarity, .*zstd_bits, got",
        ),
    ],
)
def test_score_refuses(
    root: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = [str(root / "tok") if option == "tok" else option for option in options]
    assert main(["data", "score", str(root / "en"), *given]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_score_refuses_a_model_with_another_tokenizer(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hebatron.data.prepare import prepare
    from hebatron.tokenizer import train_bpe

    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "אחר לגמרי"}) + "\n")
    other = train_bpe(["אחר לגמרי"], 270)
    other.save(tmp_path / "tok")
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", other)
    for more in ([], ["--tokenizer", str(tmp_path / "tok")]):
        assert main(["data", "score", str(tmp_path / "out"), "--model", str(root / "run"), *more]) == 2
        assert "tokenizer must be the one" in capsys.readouterr().err
