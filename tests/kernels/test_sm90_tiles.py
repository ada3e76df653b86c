"""The choice of a tile for the sm_90a kernels: a pure function of the sizes, over all of the model's and more."""

import re

import pytest
import torch

from hebatron_kernels import _native, testing

CUDA = testing.ROOT / "csrc/cuda"
SMS, EXPERTS, TOP_K, WIDTH, EXPERT_WIDTH = 132, 128, 6, 2688, 1856
# of grouped_gemm_fwd: up and the gradient of down's input, down and that of up's; of the gradients of the weights
SHAPES = [
    ("k_major", WIDTH, EXPERT_WIDTH),
    ("k_major", EXPERT_WIDTH, WIDTH),
    ("n_major", WIDTH, EXPERT_WIDTH),
    ("n_major", EXPERT_WIDTH, WIDTH),
    ("wgrad", WIDTH, EXPERT_WIDTH),
    ("wgrad", EXPERT_WIDTH, WIDTH),
]
LISTS = {"k_major": "TILES", "n_major": "DGRAD_TILES", "wgrad": "WGRAD_TILES"}
pytestmark = pytest.mark.usefixtures("emulator")


def tile_of(use, rows, k, n, experts=EXPERTS, sms=SMS, measured=()):
    return _native.emulator_module.sm90_tile((use, sms, rows, experts, k, n), list(measured))


def tiles_of(use):
    """(rows, columns, rows of a block) of every tile."""
    text = (CUDA / "grouped_gemm_sm90.h").read_text().replace("\\\n", "")
    (entries,) = re.findall(rf"#define HEBATRON_SM90_{LISTS[use]}\(X\) (.*)", text)
    found = [[int(n) for n in entry.split(",")] for entry in re.findall(r"X\(([^)]*)\)", entries)]
    return [(*entry, entry[0])[:3] for entry in found]


def waves(tile, use, counts, k, n, sms=SMS):
    """How many rounds over the chip the blocks of these experts take, and the products' clocks of them all."""
    m, columns, block = tile
    down = sum(-(-count // m) for count in counts) if use != "wgrad" else len(counts) * -(-k // m)
    rounds = -(-down * -(-n // columns) // (sms // (m // block)))
    return rounds, rounds * block * columns


def counts_of(tokens, routing):
    """The rows of every expert: tokens choose K distinct ones, all as likely or by Zipf's law."""
    likely = torch.ones(EXPERTS) if routing == "uniform" else 1.0 / torch.arange(1, EXPERTS + 1)
    share = likely / likely.sum()
    for _ in range(100):  # the chance of being among K of them: no more than one each
        share = (share * TOP_K / share.sum()).clamp(max=1.0)
    return (share * tokens).round().int().tolist()


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize(("use", "k", "n"), SHAPES)
def test_sm90_tile_exists_and_is_near_the_best_at_every_size(use, k, n, routing):
    known = {tile[:2]: tile for tile in tiles_of(use)}
    before = None
    for tokens in sorted(
        {2**i for i in range(17)} | {3 * 2**i for i in range(15)} | {5 * 2**i for i in range(14)} | {65535}
    ):
        rows = tokens * TOP_K
        chosen = tile_of(use, rows, k, n)
        assert chosen in known
        assert chosen == tile_of(use, rows, k, n)
        # what the choice costs in clocks of products, beside the cheapest tile for the rows there really are: it knows
        # only their sum, and it weighs L2 as well, so twice as many are allowed
        counts = counts_of(tokens, routing)
        cost = {tile: waves(shape, use, counts, k, n)[1] for tile, shape in known.items()}
        assert cost[chosen] <= 2.5 * min(cost.values()), f"{tokens} tokens: {chosen}, {cost}"
        before = before or chosen
    assert use == "wgrad" or before[0] == 64  # a token's experts have a row each


def test_sm90_tile_of_any_size_is_one_that_fits():
    for use in LISTS:
        known = {tile[:2] for tile in tiles_of(use)}
        for rows in (0, 1, 127, 12345, 2**31 - 600):
            for experts, sms in ((1, 1), (3, 2), (490, 132), (512, 114)):
                for k, n in ((8, 8), (4096, 14336), (2**20, 8)):
                    tile = tile_of(use, rows, k, n, experts, sms)
                    assert tile in known
                    assert experts <= 490 or tile != (128, 232)


def test_sm90_tile_takes_the_nearest_measured_one():
    def measured(rows, m, n, sms=SMS):
        return ("k_major", sms, rows, EXPERTS, WIDTH, EXPERT_WIDTH, m, n)

    table = [measured(100, 1, 1), measured(1000, 2, 2), measured(1000, 9, 9, sms=78), measured(64000, 3, 3)]

    def chosen(rows, use="k_major"):
        return tile_of(use, rows, WIDTH, EXPERT_WIDTH, measured=table)

    assert [chosen(rows) for rows in (100, 250, 400, 1000, 4000, 16000, 256000)] == [
        *((1, 1), (1, 1), (2, 2), (2, 2), (2, 2), (3, 3), (3, 3))
    ]
    # beyond a factor of four, of another use or of no rows: arithmetic
    for rows, use in (
        (24, "k_major"),
        (5000, "k_major"),
        (256001, "k_major"),
        (0, "k_major"),
        (1000, "n_major"),
    ):
        assert chosen(rows, use) == tile_of(use, rows, WIDTH, EXPERT_WIDTH)


def test_sm90_tiles_shipped_are_tiles_there_are():
    text = (CUDA / "grouped_gemm_tiles.inc").read_text()
    assert "#define HEBATRON_SM90_MEASURED(X)" in text
    for use, m, n in re.findall(r"X\((\w+),(?: \d+,){5} (\d+), (\d+)\)", text):
        assert (int(m), int(n)) in {tile[:2] for tile in tiles_of(use)}
