"""Chats through the trainer: what its batches learn, what it counts, measures and leaves, and how it resumes."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_toy import ANSWERS, chat_config, write_chats
from toy import Silent, assert_same_run, toy_train

from hebatron.chat.chat_data import chat_loss, open_chats
from hebatron.model import Hebatron
from hebatron.tokenizer import load_tokenizer
from hebatron.training.checkpoint import checkpoints
from hebatron.training.metrics import PlainReporter, read_metrics
from hebatron.training.run import Run, open_run
from hebatron.training.train import evaluate_chats, sample, train, train_step

pytest.importorskip("jinja2")
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run with noise on the embeddings."""
    run_dir = tmp_path_factory.mktemp("whole")
    prompts = {"sample_prompts": ("שלום",), "sample_tokens": 3}
    assert toy_train(chat_config(root, run_dir, prompts, neftune_alpha=5.0)).finished
    return run_dir


# ---------------------------------------------------------------- what is learnt


def answers_of(run: Run) -> list[tuple[list[int], list[int]]]:
    """(chat's tokens, answers as labels) of every chat that the trainer's batches hold, by cu_seqlens."""
    found = []
    for step in run.steps:
        for rows in run.plan.microbatches(step.rows, 128):
            batch = run.plan.batch(rows)
            for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()):
                found.append((batch.input_ids[begin:end].tolist(), batch.labels[begin:end].tolist()))
    return found


def test_batches_learn_each_answer_from_its_first_token_to_its_end_of_turn(
    root: Path, tmp_path: Path
) -> None:
    run = open_run(chat_config(root, tmp_path))
    end = run.tokenizer.token_id("<|im_end|>")
    no_thought = [run.tokenizer.token_id(token) for token in ("<think>", "</think>")]
    expected = {tuple([*run.tokenizer.encode(text), end]) for text in (*ANSWERS.values(), "לא")}
    chats = answers_of(run)
    assert len(chats) == sum(len(row) for row in run.plan.rows) > 40
    seen: Counter[tuple[int, ...]] = Counter()
    for ids, labels in chats:
        learnt = np.array(labels) != -100
        edges = np.flatnonzero(np.diff(np.concatenate([[False], learnt, [False]]).astype(int)))
        for first, stop in zip(edges[::2], edges[1::2]):
            assert (
                ids[first - 1 : first + 1] == no_thought
            )  # read before the first label: what the prompt ends with
            assert labels[stop - 1] == end
            assert ids[first + 1 : stop] == labels[first : stop - 1]
            seen[tuple(labels[first:stop])] += 1
        assert (labels[-1] == -100) and not learnt[
            : edges[0]
        ].any()  # the line break behind the turn, the question
    assert set(seen) == expected


def test_another_chat_in_the_row_changes_no_gradient_of_this_one(root: Path, tmp_path: Path) -> None:
    run = open_run(chat_config(root, tmp_path))
    row = next(i for i, row in enumerate(run.plan.rows) if len(row) > 1)
    batch = run.plan.batch(range(row, row + 1))
    cut = int(batch.cu_seqlens[1])
    other = batch.input_ids.clone()
    other[:cut] = other[:cut].flip(0)

    def gradients(ids: torch.Tensor, cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
        labels = batch.labels.clone()
        labels[:cut] = -100
        run.model.zero_grad(set_to_none=True)
        run.model(ids, cu_seqlens=cu_seqlens, labels=labels, loss_reduction="sum").loss.backward()
        return [p.grad for p in run.model.parameters() if p.grad is not None]

    ours, theirs = gradients(batch.input_ids, batch.cu_seqlens), gradients(other, batch.cu_seqlens)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    leaking = gradients(other, batch.cu_seqlens[[0, -1]])  # the measure sees a leak
    assert max(float((one - two).abs().max()) for one, two in zip(ours, leaking)) > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_step_is_normalised_by_its_learnt_tokens_for_any_number_of_microbatches(
    root: Path, tmp_path: Path, alpha: float
) -> None:
    results = []
    for tokens in (512, 128):
        config = chat_config(
            root, tmp_path, {"tokens_per_batch": 512, "tokens_per_microbatch": tokens}, neftune_alpha=alpha
        )
        run = open_run(replace(config, optimizer=replace(config.optimizer, grad_clip=0.0)))
        record, counts = train_step(run)
        results.append((record, counts, [p.grad for p in run.model.parameters()]))
    (one, one_counts, one_grads), (four, four_counts, four_grads) = results
    labels = run.plan.batch(run.steps[0].rows).labels
    assert one["loss_tokens"] == four["loss_tokens"] == int((labels != -100).sum()) < one["tokens"] / 3
    assert one_counts == four_counts and four["loss"] == pytest.approx(one["loss"], abs=1e-6)
    for ours, theirs in zip(four_grads, one_grads):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_weights_change_what_the_trainer_reads(root: Path, tmp_path: Path) -> None:
    def readings(**sft: object) -> Counter[str]:
        rows = open_run(chat_config(root, tmp_path, **sft)).plan
        return Counter(rows.samples[i].task for row in rows.rows for i in row)

    plain = readings()
    weighted = readings(epochs=2, task_weights={"count": 0.5}, lang_weights={"en": 1.5})
    assert weighted == {"count": plain["count"], "colour": 3 * plain["colour"], "word": 2 * plain["word"]}


# ---------------------------------------------------------------- held out, measured, counted


def test_held_out_chats_are_in_no_row_and_a_repeat_is_on_the_same_side(root: Path, tmp_path: Path) -> None:
    lines = (root / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    records = [{**json.loads(line), "id": f"again-{i}", "source": "other"} for i, line in enumerate(lines)]
    again = tmp_path / "again.jsonl"
    again.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config = chat_config(root, tmp_path, chats=(root / "chats.jsonl", again), held_out_permille=300)
    assert config.sft is not None
    data = open_chats(config.sft, load_tokenizer(root / "tok"), seed=0, held_out_tokens=10_000)
    read = {data.rows.samples[i].digest for row in data.rows.rows for i in row}
    unseen = Counter(sample.digest for sample in data.held_out)
    assert len(unseen) > 8 and not unseen.keys() & read and len(read) + len(unseen) == 60
    assert set(unseen.values()) == {2} and data.unseen == len(data.held_out)
    capped = open_chats(config.sft, load_tokenizer(root / "tok"), seed=0, held_out_tokens=1).held_out
    assert sorted(sample.task for sample in capped) == ["colour", "count", "word"]
    assert capped[0] is not None and capped[0].digest == min(unseen)


def test_chat_loss_is_the_mean_over_learnt_tokens_of_each_chat_alone(root: Path, tmp_path: Path) -> None:
    config = chat_config(root, tmp_path, held_out_permille=300)
    run = open_run(replace(config, data=replace(config.data, held_out_tokens=10_000)))
    assert run.chats is not None
    nats: dict[str, list[torch.Tensor]] = {}
    for s in run.chats.held_out:
        logits = run.model.eval()(torch.from_numpy(s.ids[None].astype(np.int64))).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(s.ids[1:]).long(), reduction="none"
        )
        for name in ("all", f"task/{s.task}", f"lang/{s.lang}"):
            nats.setdefault(name, []).append(losses[torch.from_numpy(s.learn[1:])].detach())
    run.model.train()
    expected = {name: float(torch.cat(values).mean()) for name, values in nats.items()}
    for tokens in (128, 1000):
        got = chat_loss(run.model, run.chats.held_out, tokens)
        assert got == pytest.approx(expected, abs=1e-5) and len(got) == 6
    assert run.model.training and chat_loss(run.model, [], 128) == {}


def test_metrics_account_for_every_chat_and_measure_the_held_out(whole: Path) -> None:
    records = read_metrics(whole)
    first, steps = records[0], [r for r in records if r["kind"] == "step"]
    assert [r["kind"] for r in records].count("chats") == 1
    assert (first["kind"], first["read"], first["used"], first["dropped"]) == (
        "chats",
        61,
        60,
        {"nothing to learn": 1},
    )
    groups = first["rows"]["groups"]
    assert groups["all"]["samples"] == 60 - first["held_out"]
    assert sum(r["loss_tokens"] for r in steps) == groups["all"]["learnt"]
    assert sum(r["tokens"] for r in steps) == groups["all"]["tokens"]
    shares = {name: group["masked_share"] for name, group in groups.items()}
    assert shares["task/word"] > shares["task/count"] > 0.5 and {"lang/he", "lang/en"} < shares.keys()
    assert set(steps[0]["router_languages"]) == {"he", "en"} and len(steps[0]["expert_overlap"]) == 1
    evals = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [4, 8, len(steps)]
    assert set(evals[0]["bpb"]) == {"he", "en"} and "all" in evals[0]["chat_loss"]
    assert "he" in evals[0]["chat_router"]["router_languages"]
    assert evals[-1]["chat_loss"]["all"] < evals[0]["chat_loss"]["all"]
    samples = [r for r in records if r["kind"] == "sample"]
    assert len(samples) == 3 and all(r["chat"] and r["prompt"] == "שלום" for r in samples)


def test_reporter_prints_chat_loss_and_the_answer_on_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = PlainReporter(4, 1)
    reporter.event({"kind": "eval", "step": 2, "bpb": {}, "chat_loss": {"all": 1.5}})
    reporter.event({"kind": "sample", "step": 2, "prompt": "שאלה", "text": "תשובה", "chat": True})
    assert capsys.readouterr().out == "step 2  chat loss: all 1.500\nstep 2  sample:\nשאלה\nתשובה\n"


# ---------------------------------------------------------------- resume


def test_resume_at_every_step_equals_the_uninterrupted_run_bitwise(
    root: Path, whole: Path, tmp_path: Path
) -> None:
    total = max(r["step"] for r in read_metrics(whole))
    prompts = {"sample_prompts": ("שלום",), "sample_tokens": 3}
    assert total >= 9
    for step in range(1, total + 1):
        assert (
            toy_train(chat_config(root, tmp_path, prompts, neftune_alpha=5.0), stop_after=step).step == step
        )
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neftune_alpha": 1.0}, r"sft\.neftune_alpha: 0\.0 -> 1\.0"),
        ({"template": "plain.jinja"}, r"plan: .* \(chats, template, tokenizer or weights\)"),
        ({"task_weights": {"word": 2.0}}, r"sft\.task_weights\.word: None -> 2\.0"),
        ({"held_out_permille": 200}, r"sft\.held_out_permille: 150 -> 200"),
    ],
)
def test_resume_refuses_other_chats_naming_the_difference(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.jinja").write_text(PLAIN, encoding="utf-8")
    toy_train(chat_config(root, tmp_path / "run"), stop_after=1)
    with pytest.raises(ValueError, match=message):
        toy_train(chat_config(root, tmp_path / "run", **change))
    assert [folder.name for folder in checkpoints(tmp_path / "run/checkpoints")] == ["step-000001"]


def test_a_run_begun_anew_accounts_for_the_chats_it_reads_now(root: Path, tmp_path: Path) -> None:
    class Killed(Silent):
        def step(self, record: object, load: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(chat_config(root, tmp_path / "run"), reporter=Killed())  # before its first checkpoint
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((root / "chats.jsonl").read_text("utf-8").splitlines(True)[:30]), "utf-8")
    toy_train(chat_config(root, tmp_path / "run", chats=(fewer,)), stop_after=1)
    accounts = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "chats"]
    assert [account["read"] for account in accounts] == [30]


def test_the_run_folders_tokenizer_takes_the_template_of_a_forced_resume(root: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jinja"
    plain.write_text(PLAIN, encoding="utf-8")
    toy_train(chat_config(root, tmp_path / "run"), stop_after=1)
    train(chat_config(root, tmp_path / "run", template=str(plain)), 2, force=True, reporter=Silent())
    assert load_tokenizer(tmp_path / "run/tokenizer").chat_template == PLAIN


# ---------------------------------------------------------------- what it leaves


def test_final_model_carries_template_and_end_of_turn_for_transformers(whole: Path) -> None:
    transformers = pytest.importorskip("transformers")
    messages = [{"role": "user", "content": "שלום"}]
    tokenizer = load_tokenizer(whole / "final")
    theirs = transformers.AutoTokenizer.from_pretrained(whole / "final")
    rendered = theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert rendered.endswith("<|im_start|>user\nשלום<|im_end|>\n<|im_start|>assistant\n<think></think>")
    ours = tokenizer.encode(rendered, special=True)
    assert theirs(rendered, add_special_tokens=False)["input_ids"] == ours
    assert load_tokenizer(whole / "tokenizer").chat_template == tokenizer.chat_template
    ends = [tokenizer.eos_id, tokenizer.token_id("<|im_end|>")]
    assert json.loads((whole / "final/generation_config.json").read_text())["eos_token_id"] == ends
    assert Hebatron.from_pretrained(whole / "final").config.eos_token_ids == tuple(ends)


def test_sample_is_an_answer_to_the_prompt_that_ends_with_its_turn(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(chat_config(root, tmp_path, {"sample_tokens": 30}))
    ids = run.prompt_ids("מה?")
    assert run.tokenizer.decode(ids, skip_special=False).endswith(
        "מה?<|im_end|>\n<|im_start|>assistant\n<think></think>"
    )
    end = run.tokenizer.token_id("<|im_end|>")
    calls: list[int] = []
    run.model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([end]), 100.0)
    )
    run.model.register_forward_hook(lambda *_: calls.append(1))
    assert sample(run, "מה?") == "" and len(calls) == 1  # the first token ends the turn, and generation


def test_evaluation_changes_nothing(root: Path, tmp_path: Path) -> None:
    run = open_run(chat_config(root, tmp_path, neftune_alpha=50.0))
    losses, _ = evaluate_chats(run)
    rng = torch.get_rng_state()
    quiet = open_run(chat_config(root, tmp_path))
    assert evaluate_chats(run)[0] == losses == evaluate_chats(quiet)[0]  # no noise in evaluation
    assert sample(run, "מה?") == sample(quiet, "מה?") and torch.equal(torch.get_rng_state(), rng)
