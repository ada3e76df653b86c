"""NEFTune: noise of the paper's size on the embeddings, a pure function of seed and row, in training alone."""

import pytest
import torch
from chat_toy import chat_config, write_chats

from hebatron import presets
from hebatron.chat.sft import neftune_noise
from hebatron.model import Hebatron
from hebatron.training.run import Run, open_run
from hebatron.training.train import train_step

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder)
    return open_run(chat_config(folder, folder / "run", neftune_alpha=5.0))


def test_noise_is_uniform_in_the_papers_bound_for_each_documents_own_length(run: Run) -> None:
    batch, width = run.plan.batch(range(4)), 512
    noise_TD = neftune_noise(batch, 5.0, width, seed=3)
    lengths = batch.cu_seqlens.diff().tolist()
    assert len(set(lengths)) > 3
    for document, length in zip(noise_TD.split(lengths), lengths, strict=True):
        bound = 5.0 / (length * width) ** 0.5
        assert 0.999 * bound < float(document.abs().max()) <= bound
        assert float(document.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert float(document.mean()) == pytest.approx(0, abs=0.03 * bound)


def test_noise_belongs_to_seed_and_row_however_a_step_is_cut(run: Run) -> None:
    whole = neftune_noise(run.plan.batch(range(2, 6)), 5.0, 32, seed=3)
    pieces = [neftune_noise(run.plan.batch(rows), 5.0, 32, seed=3) for rows in (range(2, 3), range(3, 6))]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(neftune_noise(run.plan.batch(range(2, 6)), 5.0, 32, seed=4), whole)
    first = [neftune_noise(run.plan.batch(range(row, row + 1)), 1.0, 32, seed=3)[0] for row in range(6)]
    directions = torch.nn.functional.normalize(torch.stack(first))
    assert float((directions @ directions.T - torch.eye(6)).abs().max()) < 0.8  # no row repeats another's


def test_noise_draws_from_no_shared_generator(run: Run) -> None:
    before = torch.get_rng_state()
    assert run.embedding_noise(run.plan.batch(range(1))) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_forward_adds_the_noise_to_the_embeddings() -> None:
    model, ids = Hebatron(presets.tiny(64), seed=1), torch.arange(10, 30)
    cu_seqlens, noise_TD = torch.tensor([0, 8, 20], dtype=torch.int32), torch.randn(20, 64)
    noisy = model(ids, cu_seqlens=cu_seqlens, embedding_noise=noise_TD).logits
    with torch.no_grad():
        head = model.lm_head.weight.clone()
        model.backbone.embeddings.weight[ids] += noise_TD
    assert torch.equal(head, model.lm_head.weight)
    torch.testing.assert_close(noisy, model(ids, cu_seqlens=cu_seqlens).logits)


def test_trainer_adds_noise_where_the_run_file_says(run: Run) -> None:
    losses = []
    for alpha in (0.0, 5.0, 5.0):
        assert run.config.sft is not None
        folder = run.config.sft.chats[0].parent
        losses.append(
            train_step(open_run(chat_config(folder, folder / "run", neftune_alpha=alpha)))[0]["loss"]
        )
    assert losses[1] == losses[2] and abs(losses[0] - losses[1]) > 1e-4


RULE = "embedding_noise must come in training, with cu_seqlens and without cache, got "


@pytest.mark.parametrize(
    ("training", "packed", "cached", "shape", "message"),
    [
        (False, True, False, (6, 64), RULE + "training=False, cu_seqlens=True, cache=False"),
        (True, False, False, (6, 64), RULE + "training=True, cu_seqlens=False, cache=False"),
        (True, True, True, (6, 64), RULE + "training=True, cu_seqlens=True, cache=True"),
        (True, True, False, (6, 63), r"embedding_noise must have shape \(6, 64\), got \(6, 63\)"),
    ],
)
def test_noise_elsewhere_is_refused(
    training: bool, packed: bool, cached: bool, shape: tuple[int, int], message: str
) -> None:
    model = Hebatron(presets.tiny(64)).train(training)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32) if packed else None
    ids, cache = torch.arange(6) if packed else torch.arange(6)[None], model.new_cache(1) if cached else None
    with pytest.raises(ValueError, match=message):
        model(ids, cu_seqlens=cu_seqlens, cache=cache, embedding_noise=torch.zeros(shape))
