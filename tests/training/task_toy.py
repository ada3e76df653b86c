"""A tokenizer and models for the tests of scoring, completing, tasks and chats."""

import torch
from toy import WORDS

from hebatron import Hebatron, ModelConfig
from hebatron.tokenizer import Tokenizer, train_bpe

VOCABULARY = 330
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(10)] + ["the answer is a word: yes, no"]


def make_tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, VOCABULARY)


def make_model(config: ModelConfig, seed: int) -> Hebatron:
    model = Hebatron(config, seed=seed).eval()
    with torch.no_grad():  # fresh weights are small, and every choice nearly as likely as the next
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model
