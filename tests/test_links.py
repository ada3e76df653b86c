"""README and docs lead where they say: relative links, documents named, files in commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "bench|csrc|docs|examples|hebatron|hebatron_kernels|tests"


def headings(page: Path) -> set[str]:
    """The anchors that a page's headings make."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_relative_links_resolve(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in headings(found), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_a_document_is_named_by_a_link(page: Path) -> None:
    text = re.sub(r"\[[^\]]*\]\([^)]*\)", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    assert re.findall(r"\bdocs/\w+\.md", text) == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name
)
def test_files_named_exist(page: Path) -> None:  # the log tells of what was there then
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w\.(?:cpp|cuh|cu|h|md|py|sh|toml)\b", text)
    assert [name for name in named if not (ROOT / name).is_file()] == []
