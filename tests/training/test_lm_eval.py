"""lm-eval's harness over our models: its requests, a Hebrew task from local files, and transformers' own figures."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from task_toy import make_model, make_tokenizer
from toy import WORDS

from hebatron import Hebatron, cli, presets
from hebatron.chat.template import NEMOTRON3
from hebatron.evaluation.complete import complete
from hebatron.evaluation.scoring import multiple_choice, score_choices
from hebatron.hub import export_hf
from hebatron.tokenizer import Tokenizer

REASON = "lm-eval is not installed: pip install 'hebatron[eval]'"
YAML = """
task: hebrew_local
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "שאלה: {{{{question}}}}\\nתשובה:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
DOCS = [
    {"question": f"מה {WORDS[i]}?", "choices": ["שלום עולם", "ספר", "ילד " * (1 + i % 2)], "answer": i % 3}
    for i in range(8)
]
PAIRS = [
    ("שלום עולם", " ספר ילד"),
    ("", "ילד קטן"),
    ("ספר ", "גדול"),  # lm-eval gives the space to the continuation
    ("the answer is", " yes"),
    (" ".join(WORDS * 3), " שלום"),
    ("שָׁלוֹם", " עוֹלָם"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return make_model(presets.tiny(330).replace(max_position_embeddings=128), 3)


@pytest.fixture(scope="module")
def folder(model: Hebatron, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lm_eval")
    tokenizer.save(root / "tokenizer")
    export_hf(model, root / "tokenizer", root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    pytest.importorskip("lm_eval", reason=REASON)
    from hebatron.evaluation.lm_eval_model import HebatronLM

    return HebatronLM(str(folder))


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_lm_eval_says_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "hebatron.evaluation.lm_eval_model", raising=False)
    assert cli.main(["eval", str(folder), "--lm-eval", "hebrew_local"]) == 2
    assert "lm_eval must be installed, got none; pip install 'hebatron[eval]'" in capsys.readouterr().err


def test_loglikelihood_is_the_score_of_the_choice(ours: Any, model: Hebatron, tokenizer: Tokenizer) -> None:
    found = ours.loglikelihood(requests(*PAIRS))
    scored = score_choices(model, tokenizer, [(context, [choice]) for context, choice in PAIRS])
    assert [log_prob for log_prob, _ in found] == pytest.approx([row[0] for row in scored], abs=1e-5)
    assert {type(greedy) for _, greedy in found} == {bool}


def test_rolling_scores_every_token_of_a_long_text_once(
    ours: Any, model: Hebatron, tokenizer: Tokenizer
) -> None:
    text = " ".join(WORDS * 20)
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert len(ids) > 128  # two windows
    first = model(torch.tensor([ids[:128]])).logits[0].double().log_softmax(-1)
    wanted = float(first.gather(1, torch.tensor(ids[1:129])[:, None]).sum())
    last = ids[-129:]  # a full window, of which the tokens behind the first window's are scored
    rest = len(ids) - 129
    logits_LV = model(torch.tensor([last[:-1]])).logits[0, -rest:].double().log_softmax(-1)
    wanted += float(logits_LV.gather(1, torch.tensor(last[-rest:])[:, None]).sum())
    (found,) = ours.loglikelihood_rolling(requests((text,)))
    assert found == pytest.approx(wanted, abs=1e-3, rel=1e-5)


def test_generate_until_is_complete(ours: Any, model: Hebatron, tokenizer: Tokenizer) -> None:
    texts = ["שלום", "ספר ילד", "the answer"]
    whole = [one.text for one in complete(model, tokenizer, texts, max_new_tokens=9)]
    until = whole[1][2:4]
    asked = [
        {"max_gen_toks": 9},
        {"max_gen_toks": 9, "until": [until, ""], "do_sample": False, "temperature": 0.0},
    ]
    found = ours.generate_until(requests(*((text, options) for options in asked for text in texts)))
    assert found == whole + [text.split(until)[0] for text in whole]
    with pytest.raises(ValueError, match=r"generation_kwargs must be among until, .*, got num_beams"):
        ours.generate_until(requests(("שלום", {"num_beams": 4})))


def test_chats_are_rendered_by_the_template(folder: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("lm_eval", reason=REASON)
    from hebatron.evaluation.lm_eval_model import HebatronLM

    chatty = HebatronLM(str(folder), template="nemotron3")
    prompt = chatty.apply_chat_template([{"role": "user", "content": "שלום"}])
    assert prompt.endswith("<|im_start|>user\nשלום<|im_end|>\n<|im_start|>assistant\n<think></think>")
    ((log_prob, _),) = chatty.loglikelihood(requests((prompt, "עולם")))
    ((plain, _),) = HebatronLM(str(folder)).loglikelihood(requests((prompt, "עולם")))
    assert abs(log_prob - plain) > 1e-3  # control tokens, and not their characters
    assert chatty.chat_template(True) == NEMOTRON3 and chatty.tokenizer_name == tokenizer.fingerprint


def test_a_chats_answer_ends_with_its_turn(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason=REASON)
    from hebatron.evaluation import complete as completing
    from hebatron.evaluation.lm_eval_model import HebatronLM

    chatty = HebatronLM(str(folder), template="nemotron3")
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None and end not in chatty.model.config.eos_token_ids
    written = iter([*tokenizer.encode("שלום"), end, *tokenizer.encode("user")] * 2)
    monkeypatch.setattr(completing, "choose", lambda *_: torch.tensor([next(written)]))
    asked = ("שאלה", {"max_gen_toks": len(tokenizer.encode("שלום")) + 2})
    assert chatty.generate_until(requests(asked))[0].startswith("שלוםu")  # no chat: it has no turns
    written = iter([*tokenizer.encode("שלום"), end])
    prompt = chatty.apply_chat_template([{"role": "user", "content": asked[0]}])
    assert chatty.generate_until(requests((prompt, asked[1]))) == ["שלום"]


def test_a_model_is_given_in_one_way(model: Hebatron, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason=REASON)
    from hebatron.evaluation.lm_eval_model import HebatronLM

    for given in ({}, {"model": model}, {"path": str(folder), "model": model}):
        with pytest.raises(ValueError, match="either path, or model and tokenizer, must be given"):
            HebatronLM(**given)


def test_loglikelihoods_are_transformers_own(ours: Any, folder: Path) -> None:
    """lm-eval's HFLM on the folder we export, in unpatched transformers."""
    pytest.importorskip("lm_eval", reason=REASON)
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    asked = requests(*PAIRS)
    for (got, got_greedy), (want, want_greedy) in zip(
        ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        assert got == pytest.approx(want, abs=1e-4) and got_greedy == want_greedy
    long = requests((" ".join(WORDS * 20),))
    assert ours.loglikelihood_rolling(long)[0] == pytest.approx(
        theirs.loglikelihood_rolling(long, disable_tqdm=True)[0], abs=1e-3
    )


def test_a_local_hebrew_task_runs_offline(
    folder: Path,
    model: Hebatron,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason=REASON)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data, out = tmp_path / "docs.jsonl", tmp_path / "out.json"
    data.write_text("\n".join(json.dumps(doc, ensure_ascii=False) for doc in DOCS), encoding="utf-8")
    (tmp_path / "hebrew_local.yaml").write_text(YAML.format(data=data), encoding="utf-8")
    arguments = ["eval", str(folder), "--lm-eval", "hebrew_local", "--include-path", str(tmp_path)]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert "hebrew_local" in capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))["lm_eval"]["hebrew_local"]
    items = [
        (f"שאלה: {doc['question']}\nתשובה:", [f" {choice}" for choice in doc["choices"]], doc["answer"])
        for doc in DOCS
    ]
    wanted = multiple_choice(model, tokenizer, items).accuracy
    for name in ("acc", "acc_norm"):
        assert found[f"{name},none"] == pytest.approx(wanted[name].value)
        assert found[f"{name}_stderr,none"] == pytest.approx(wanted[name].stderr)
