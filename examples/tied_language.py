"""A tied language model: one matrix is the embedding, where text comes in, and the head, where the next word is told."""

from __future__ import annotations

import re
from collections import Counter
from pydoc_data.topics import topics

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramwatch

WORDS, WIDTH, LENGTH, BATCH = 1000, 64, 32, 16


class TinyGPT(nn.Module):
    """Two causal blocks between an embedding and a head that is the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.head(self.norm(self.blocks(self.embed(text) + self.places, mask, is_causal=True)))


def corpus() -> Tensor:
    """The help texts that ship with Python as numbers: the 1000 commonest words and signs, 0 for all others."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()))
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(WORDS - 1), 1)}
    return torch.tensor([number.get(word, 0) for word in words])


def train(steps: int) -> paramwatch.Watch:
    torch.manual_seed(0)
    net, text = TinyGPT(), corpus()
    watch = paramwatch.attach(net, uses=5, include="embed.weight")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
        window = text[starts + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(net(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    watch.close()
    return watch


def table(watch: paramwatch.Watch) -> pd.DataFrame:
    """What the two uses of the matrix contributed, at some of the split steps."""
    norms = watch.uses()["use_norm"].droplevel("parameter").unstack("use")
    shares = watch.uses()["use_share"].droplevel("parameter").unstack("use")
    found = pd.DataFrame({"|embed|": norms["embed"], "|head|": norms["head"]})
    found["head / embed"] = found["|head|"] / found["|embed|"]
    found["share of head"] = shares["head"]
    found["agreement"] = watch.agreement().droplevel("parameter")["agreement"]
    return found
