"""Near-duplicates among planted ones: found by how much was changed, and at a cost that grows with the texts."""

import random
from typing import Any

import pytest

from hebatron.data.duplicates import NearDuplicates, run_hashes

pytest.importorskip("datasketch")


def text(rng: random.Random, words: int = 300) -> list[str]:
    return ["".join(rng.choices("אבגדהוזחטיכלמנ", k=rng.randrange(2, 7))) for _ in range(words)]


def changed(rng: random.Random, words: list[str], share: float, together: bool) -> str:
    """This share of the words replaced: one stretch of them, or each by chance."""
    count = round(share * len(words))
    start = rng.randrange(len(words) - count)
    places = set(range(start, start + count)) if together else set(rng.sample(range(len(words)), count))
    return " ".join(text(rng, 1)[0] if i in places else word for i, word in enumerate(words))


def found(share: float, together: bool, threshold: float, copies: int = 40) -> float:
    """The share of changed copies that are found, each as a copy of its own original; no original is."""
    rng = random.Random(1)
    originals = [text(rng) for _ in range(copies)]
    near = NearDuplicates(threshold)
    assert all(near.add(" ".join(words)) is None for words in originals)
    hits = [near.add(changed(rng, words, share, together)) for words in originals]
    assert all(hit is None or hit[0] == i for i, hit in enumerate(hits))
    return sum(hit is not None for hit in hits) / copies


@pytest.mark.parametrize(
    ("share", "together", "threshold", "low", "high"),
    [
        (0.05, True, 0.8, 0.95, 1.0),  # one paragraph: Jaccard 0.88
        (0.05, False, 0.5, 0.95, 1.0),  # here and there: 0.95**5 of the runs stay whole, Jaccard 0.63
        (0.05, False, 0.8, 0.0, 0.05),
        (0.2, True, 0.5, 0.95, 1.0),  # Jaccard 0.65
        (0.2, True, 0.8, 0.0, 0.05),
        (0.2, False, 0.8, 0.0, 0.0),  # 0.2
        (0.5, True, 0.8, 0.0, 0.0),  # 0.33
        (0.5, False, 0.5, 0.0, 0.0),
    ],
)
def test_planted_copies_are_found_by_how_much_was_changed(
    share: float, together: bool, threshold: float, low: float, high: float
) -> None:
    assert low <= found(share, together, threshold) <= high


def test_similarity_is_the_jaccard_index_of_the_runs() -> None:
    rng, near = random.Random(2), NearDuplicates(0.3)
    worst = 0.0
    for _ in range(40):
        words = text(rng)
        copy = changed(rng, words, rng.uniform(0.02, 0.3), True)
        near.add(" ".join(words))
        hit = near.add(copy)
        ours, theirs = set(run_hashes(" ".join(words)).tolist()), set(run_hashes(copy).tolist())
        assert hit is not None
        worst = max(worst, abs(hit[1] - len(ours & theirs) / len(ours | theirs)))
    assert worst < 0.15  # 128 permutations: standard error at most 0.044


def test_signatures_share_their_permutations() -> None:
    """Drawn anew for each text they cost 14 ms of it, 2,000 times the signature itself."""
    near = NearDuplicates()
    for words in ("אחת שתיים", "שלוש ארבע"):
        assert near.add(words) is None
    first, second = near._signatures
    assert first.permutations is second.permutations


def test_unrelated_texts_are_hardly_ever_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are hashed once each, and compared with the few that share a band, not with all before them."""
    import datasketch

    compared: list[int] = []
    plain = datasketch.MinHash.jaccard

    def counting(self: Any, other: Any) -> float:
        compared.append(1)
        return float(plain(self, other))

    monkeypatch.setattr(datasketch.MinHash, "jaccard", counting)
    counts = []
    for size in (100, 200, 400):
        rng, near = random.Random(3), NearDuplicates(0.8)
        compared.clear()
        for _ in range(size):
            words = text(rng, 40)
            near.add(" ".join(words))
            near.add(" ".join(words[:-1]))
        counts.append(len(compared))
    for size, count in zip((100, 200, 400), counts):
        assert (
            size * 0.9 <= count <= size * 1.2
        )  # each planted copy with its original: linear, not size squared
