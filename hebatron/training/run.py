"""What a training run works on, opened from its configuration: corpora or chats, plan, model, optimizer, checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..chat.chat_data import ChatData, open_chats
from ..chat.sft import ChatRows, neftune_noise
from ..config import ModelConfig
from ..curriculum.build import build_plan
from ..curriculum.plan import Batch, Plan, Step
from ..data.corpus import Corpus
from ..files import fsync, new_folder, replace_text
from ..model import Hebatron
from ..presets import PRESETS
from ..tokenizer import Tokenizer, load_tokenizer
from .anchor_kl import Base, open_base, weights_hash
from .checkpoint import CheckpointError, load_checkpoint, load_state, load_weights, newest_valid
from .lora import add_adapters, merge_adapters
from .optim import build_optimizer
from .runconfig import curriculum
from .sections import LoraConfig, RunConfig
from .trees import differences, from_table, to_table

TOKENIZER = "tokenizer"  # in the run folder


@dataclass
class Run:
    """Everything the loop works on; `step` and `bad_in_row` are all of its own state.

    base: of the KL term. chats: of a run over chats. frozen: hash of the weights under adapters. fault: what was not
    finite in the last bad step.
    """

    config: RunConfig
    tokenizer: Tokenizer
    plan: Plan | ChatRows
    steps: list[Step]
    held_out: list[tuple[str, Corpus]]
    model: Hebatron
    optimizer: torch.optim.AdamW
    base: Base | None = None
    step: int = 0
    bad_in_row: int = 0
    fault: str = ""
    chats: ChatData | None = None
    frozen: str | None = None
    bpb: dict[str, float] = field(default_factory=dict)
    chat_loss: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return len(self.steps)

    @property
    def checkpoints(self) -> Path:
        return self.config.run_dir / "checkpoints"

    @property
    def frozen_path(self) -> str | None:
        """Where the model under adapters is, from any folder."""
        path = self.config.model.path
        return None if self.frozen is None or path is None else str(path.resolve())

    @property
    def languages_read(self) -> set[str] | None:
        """Those of the rows so far; None, for unknown, where the run goes on from a model."""
        if self.config.model.path is not None:
            return None
        return self.plan.languages(self.steps[self.step - 1].rows.stop)

    def prompt_ids(self, prompt: str) -> list[int]:
        """A sample prompt as the model gets it: for chats, as what a user says."""
        return _prompt_ids(prompt, self.tokenizer, self.chats)

    def embedding_noise(self, batch: Batch) -> torch.Tensor | None:
        """NEFTune's noise for this batch, on the model's device; None where the run has none."""
        settings, model = self.config.sft, self.model
        if settings is None or not settings.neftune_alpha:
            return None
        width = model.config.hidden_size
        noise = neftune_noise(batch, settings.neftune_alpha, width, self.config.training.seed)
        return noise.to(model.device)


def open_plan(config: RunConfig, verify: bool = True) -> tuple[Plan, Tokenizer, list[tuple[str, Corpus]]]:
    """The plan of a run over text, its tokenizer and its held-out text; `verify`: as `Corpus.open` has it."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    corpora, held_out = open_corpora(config, tokenizer, verify)
    return build_plan(curriculum(config), corpora), tokenizer, held_out


def open_run_chats(config: RunConfig) -> tuple[ChatData, Tokenizer]:
    """The chats of a run with an [sft] section, and its tokenizer."""
    if config.sft is None:
        raise ValueError("run file must have [sft], got phases")
    tokenizer = load_tokenizer(config.data.tokenizer)
    return open_chats(config.sft, tokenizer, config.training.seed, config.data.held_out_tokens), tokenizer


def open_corpora(
    config: RunConfig, tokenizer: Tokenizer, verify: bool = True
) -> tuple[dict[str, Corpus], list[tuple[str, Corpus]]]:
    """The text to train on and the text held out of it."""
    corpora: dict[str, Corpus] = {}
    held_out: list[tuple[str, Corpus]] = []
    for entry in config.data.corpora:
        corpus = Corpus.open(entry.path, tokenizer, verify=verify)
        if permille := config.data.held_out_permille:
            count = int(corpus.held_out(permille).sum())
            if not 0 < count < len(corpus):
                raise ValueError(
                    f"data.held_out_permille must leave documents on both sides of corpus {entry.name!r} "
                    f"({entry.path}), got {permille} per thousand, {count} of its {len(corpus)} documents: which ones "
                    f"their hashes decide; {'raise' if not count else 'lower'} it, add documents, or hold out none (0)"
                )
            corpus, unseen = corpus.split(permille)
            held_out.append((entry.name, unseen))
        corpora[entry.name] = corpus
    folders = [
        (entry.name, Corpus.open(entry.path, tokenizer, verify=verify)) for entry in config.data.held_out
    ]
    refuse_overlap(corpora, folders)
    return corpora, held_out + folders


def open_run(config: RunConfig) -> Run:
    """Tokenizer, corpora or chats, plan, model and optimizer of a run at step 0."""
    plan: Plan | ChatRows
    if config.sft is None:
        chats = None
        plan, tokenizer, held_out = open_plan(config)
    else:
        chats, tokenizer = open_run_chats(config)
        plan, (_, held_out) = chats.rows, open_corpora(config, tokenizer)
    model = open_model(config, tokenizer)
    frozen = None
    if config.lora is not None:
        frozen = weights_hash(model)
        add_adapters(model, config.lora, config.training.seed)
    # what the run's texts or turns end with is an end of generation, here and in the exported model
    learnt = [tokenizer.eos_id] if chats is None else [tokenizer.token_id(chats.encoder.end_of_turn)]
    known = model.config.eos_token_ids
    if not set(learnt) <= set(known):
        model.config = model.config.replace(eos_token_id=(*known, *learnt))
    check_prompts(config, tokenizer, model, chats)
    steps = plan.steps(config.training.tokens_per_batch)
    optimizer, base = build_optimizer(model, config.optimizer), open_base(config, model)
    return Run(config, tokenizer, plan, steps, held_out, model, optimizer, base, chats=chats, frozen=frozen)


def refuse_overlap(corpora: dict[str, Corpus], held_out: list[tuple[str, Corpus]]) -> None:
    """A text that is trained on and evaluated measures memory: refused, by the hash of the text. (The two sides
    of `Corpus.split` cannot overlap, between corpora neither.)"""
    for unseen_name, unseen in held_out:
        hashes = {unseen.hash(i) for i in range(len(unseen))}
        for name, corpus in corpora.items():
            both = sum(corpus.hash(i) in hashes for i in range(len(corpus)))
            if both:
                raise ValueError(
                    f"train: data.held_out {unseen_name!r} must share no document with data.corpora, "
                    f"got {both} that are also in {name!r}"
                )


def _prompt_ids(prompt: str, tokenizer: Tokenizer, chats: ChatData | None) -> list[int]:
    if chats is None:
        return tokenizer.encode(prompt)
    return chats.encoder.prompt_ids([{"role": "user", "content": prompt}])


def check_prompts(
    config: RunConfig, tokenizer: Tokenizer, model: Hebatron, chats: ChatData | None = None
) -> None:
    """A prompt that cannot be continued is refused now and not at the first evaluation."""
    room = model.config.max_position_embeddings - config.training.sample_tokens
    for i, prompt in enumerate(config.training.sample_prompts):
        length = len(_prompt_ids(prompt, tokenizer, chats))
        if not 1 <= length <= room:
            raise ValueError(
                f"train: training.sample_prompts[{i}] must have 1 to {room} tokens, got {length} in {prompt[:40]!r}"
            )


def open_model(config: RunConfig, tokenizer: Tokenizer) -> Hebatron:
    """The model of `config.model` with fp32 master parameters; fresh weights come from training.seed."""
    section = config.model
    compute_dtype, device = getattr(torch, section.compute_dtype), pick_device(config.training.device)
    if section.path is not None:
        model = Hebatron.from_pretrained(section.path, dtype=torch.float32, device=device)
        model.compute_dtype = compute_dtype
    else:
        model = Hebatron(
            model_config(config, tokenizer), compute_dtype, seed=config.training.seed, device=device
        )
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"train: model.vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {model.config.vocab_size}"
        )
    longest = config.sft.seq_len if config.sft else max(phase.seq_len for phase in config.phases)
    if longest > model.config.max_position_embeddings:
        raise ValueError(
            f"train: {'sft' if config.sft else 'phases'} seq_len must be at most the model's max_position_embeddings "
            f"{model.config.max_position_embeddings}, got {longest}"
        )
    model.train()
    return model


def pick_device(name: str = "auto") -> str:
    """auto: a GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def model_config(config: RunConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The preset or pattern with the tokenizer's vocabulary and special ids, then `model.fields` over it."""
    section = config.model
    ids = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    if section.pattern is not None:
        base: dict[str, Any] = {"hybrid_override_pattern": section.pattern}
    else:
        base = PRESETS[str(section.preset)]().to_hub()
    try:
        return ModelConfig.from_hub({**base, **ids, **section.fields})
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def resume(run: Run, force: bool) -> list[str]:
    """Load the newest intact checkpoint, if there is one. Returns what to tell the user."""
    folder, notices = newest_valid(run.checkpoints)
    if folder is None:
        return notices
    state = load_state(folder)
    wrong = differences(state.get("config"), to_table(run.config, hashed_only=True))
    if state.get("plan_hash") != run.plan.hash:
        what = "corpora, phases or order" if run.chats is None else "chats, template, tokenizer or weights"
        wrong.append(f"plan: {state.get('plan_hash')!s:.12} -> {run.plan.hash:.12} ({what})")
    hashes = [str(state.get("base")), str(run.base and run.base.hash)]
    if hashes[0] != hashes[1]:
        wrong.append(f"anchor_kl.base: {hashes[0]:.12} -> {hashes[1]:.12} (hash of the frozen base)")
    if state.get("frozen") != run.frozen:
        wrong.append(
            f"model.path: {state.get('frozen')!s:.12} -> {run.frozen!s:.12} (hash of the frozen weights)"
        )
    if wrong and not force:
        raise ValueError(
            f"train: run_dir must hold this very run to resume it, got {folder} of another: {'; '.join(wrong)}; "
            "choose a new run_dir, or force (--force)"
        )
    step = state["step"]
    if step > run.total:
        raise ValueError(f"train: {folder} must be within the plan's {run.total} steps, got step {step}")
    load_checkpoint(folder, run.model, run.optimizer)
    run.step = step
    forced = [f"forced: {line}" for line in wrong]
    return [*notices, *forced, f"resuming from {folder.name} of {run.total} steps"]


def headline(run: Run) -> str:
    """Size of the run in three numbers."""
    parameters = sum(p.numel() for p in run.model.parameters())
    if isinstance(run.plan, Plan):
        phases = ", ".join(f"{phase.name} {run.plan.tokens_in(rows):,}" for phase, rows in run.plan.blocks)
    else:
        phases = f"of chats, {run.plan.describe()['groups']['all']['learnt']:,} learnt"
    return (
        f"{parameters:,} parameters; {run.plan.num_tokens:,} tokens ({phases}) in {run.total} steps; "
        f"plan {run.plan.hash:.12}"
    )


def write_config(config: RunConfig) -> None:
    """The resolved tree as run_dir/config.json."""
    text = json.dumps(to_table(config), indent=1, ensure_ascii=False)
    replace_text(config.run_dir / "config.json", text)


def save_tokenizer(run: Run) -> None:
    """The tokenizer as run_dir/tokenizer: with it, a run folder can be used wherever it is moved to."""
    folder = run.config.run_dir / TOKENIZER
    if folder.exists():
        saved = load_tokenizer(folder)
        if (saved.fingerprint, saved.chat_template) == (
            run.tokenizer.fingerprint,
            run.tokenizer.chat_template,
        ):
            return
    with new_folder(folder) as fresh:
        run.tokenizer.save(fresh)
        for path in (*fresh.iterdir(), fresh):
            fsync(path)


def open_trained(run_dir: Path) -> tuple[Hebatron, Path, list[str]]:
    """The model of a run's newest intact checkpoint, its tokenizer's folder, and a notice for each damaged one."""
    folder, notices = newest_valid(run_dir / "checkpoints")
    if folder is None:
        raise ValueError(f"{run_dir}: must hold a checkpoint, got none; train at least one step")
    return open_checkpoint(folder, pick_device()), run_dir / TOKENIZER, notices


def open_checkpoint(folder: Path, device: str) -> Hebatron:
    """The model of one checkpoint; adapters are merged into the model they were trained on, found where it was or,
    that folder being gone, where `model.path` of the run leads from here."""
    state = load_state(folder)
    try:
        config, section = ModelConfig.from_hub(state["model"]), state["config"]["model"]
        adapters, dtype = state["config"].get("lora"), getattr(torch, section["compute_dtype"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {folder} must state its model, got no {error}") from error
    if adapters is None:
        model = Hebatron(config, dtype, device=device)
        load_weights(folder, model)
        return model
    places = [Path(place) for place in (state.get("frozen_path"), section["path"]) if place]
    base = next((place for place in places if place.is_dir()), None)
    if base is None:
        raise CheckpointError(
            f"checkpoint: {folder} has adapters for the model {state.get('frozen')!s:.12}, which must be at "
            f"{' or '.join(map(str, places))}, got no folder there"
        )
    model = Hebatron.from_pretrained(base, dtype=torch.float32, device=device)
    if (found := weights_hash(model)) != state.get("frozen"):
        raise CheckpointError(
            f"checkpoint: {folder} has adapters for the model {state.get('frozen')!s:.12}, got {found:.12} in "
            f"{base}"
        )
    add_adapters(model, from_table(LoraConfig, adapters, "lora"), seed=0)
    load_weights(folder, model)
    merge_adapters(model)
    model.config, model.compute_dtype = config, dtype
    return model
