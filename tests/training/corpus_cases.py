"""Texts in three languages, the files that hold them, and what is in a folder: shared by the tests of data."""

import json
from pathlib import Path
from typing import Any

import zstandard

HEBREW = [
    "הרוח נשבה כל הלילה מן הים, ובבוקר מצאו הדייגים סירה ריקה על החוף.",
    "סבתא אפתה לחם שעורה. הנכדים חיכו ליד התנור, ואיש לא דיבר עד שהלחם יצא.",
    'מנכ"לית המפעל אמרה: "בשנת 1987 עבדו כאן 340 פועלים, והיום רק 12".',
    "הַשֶּׁמֶשׁ זָרְחָה וְהַצִּפּוֹר שָׁרָה עַל הָעֵץ",
]
ENGLISH = [
    "The wind blew all night from the sea; in the morning an empty boat lay on the beach.",
    "Grandmother baked barley bread, and nobody said a word until it was done.",
]
CODE = ["def area(width: float, height: float) -> float:\n    return width * height\n"]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    raw = text.encode("utf-8")
    path.write_bytes(zstandard.compress(raw) if path.suffix == ".zst" else raw)
    return path


def write_inputs(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    hebrew = [{"text": text, "source": f"he-{i % 2}", "lang": "he", "id": i} for i, text in enumerate(HEBREW)]
    (folder / "area.txt").write_text(CODE[0], encoding="utf-8", newline="")
    return [
        write_jsonl(folder / "hebrew.jsonl.zst", hebrew),
        write_jsonl(folder / "english.jsonl", [{"text": text} for text in ENGLISH]),
        folder / "area.txt",
    ]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
