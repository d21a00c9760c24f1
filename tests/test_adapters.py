"""The truth harness over models that Hugging Face's libraries change: adapters added and merged, embeddings resized."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from changing import MLP, assert_rows, assign, train
from harness import LR, Lab, verify
from loops import mlp, sgd
from torch import nn

import paramwatch

with warnings.catch_warnings():
    # what these warn of at import is about their own dependencies
    warnings.simplefilter("ignore")
    peft: Any = pytest.importorskip("peft", reason="adapters are made with peft")
    transformers: Any = pytest.importorskip("transformers", reason="embeddings are resized by transformers")

ADAPTED = {
    "0.base_layer.weight": (4, 3),
    "0.base_layer.bias": (4,),
    "0.lora_A.default.weight": (2, 3),
    "0.lora_B.default.weight": (4, 2),
    "2.weight": (1, 4),
    "2.bias": (1,),
}


def adapters_added_and_merged(lab: Lab) -> None:
    net = mlp(dtype=torch.float32)
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
    adapters = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=LR)
    train(lab, net, adapters, first=2)
    merged = wrapped.merge_and_unload()
    assert merged is net
    net.requires_grad_(True)
    train(lab, net, sgd(net), first=4)
    if lab.watched:
        assert_rows(lab, (0, MLP), (2, ADAPTED), (4, MLP))


def test_adapters_that_are_added_and_merged_are_rows_while_they_are_there() -> None:
    lab = verify(adapters_added_and_merged)

    assert lab.watch is not None
    norms = lab.watch.frame("update_norm").notna()
    assert norms["0.lora_B.default.weight"].to_list() == [False, False, True, True, False, False]
    assert norms["0.weight"].to_list() == [True, True, False, False, True, True]
    assert not norms["0.base_layer.weight"].any()


def test_what_peft_wraps_has_the_names_that_it_had() -> None:
    wrapped = peft.get_peft_model(mlp(dtype=torch.float32), peft.LoraConfig(r=2, target_modules=["0"]))
    with paramwatch.attach(wrapped) as watch:
        wrapped.zero_grad()

    assert {name: tuple(shape) for name, shape in watch.parameters["shape"].items()} == ADAPTED
    assert repr(watch).startswith("<Watch in memory: Sequential")


class Language(nn.Module):
    """A tiny model whose head is tied to its embedding, behind what `loss_of` asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.GPT2Config(vocab_size=11, n_positions=4, n_embd=4, n_layer=1, n_head=1, tie_word_embeddings=True)
        self.lm = transformers.GPT2LMHeadModel(config).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm(input_ids=(x.abs() * 3).long()).logits.mean((1, 2))[:, None]


def resized_embeddings(lab: Lab) -> None:
    torch.manual_seed(0)
    net = Language()
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    net.lm.resize_token_embeddings(13, mean_resizing=False)
    net.zero_grad()
    train(lab, net, sgd(net), first=2)


def test_a_tied_embedding_that_is_resized_stays_tied_and_has_another_shape() -> None:
    watch = verify(resized_embeddings).watch

    assert watch is not None
    (tie,) = watch.ties
    assert tie.names == ("lm.transformer.wte.weight", "lm.lm_head.weight")
    shapes = [dict(zip(b.step, [b.inventory.rows[0].shape] * len(b.step), strict=True)) for b in watch._read().blocks]
    assert shapes[0][1] == (11, 4)
    assert shapes[-1] == {2: (13, 4), 3: (13, 4)}


def tie_again_after_assigning(lab: Lab) -> None:
    torch.manual_seed(0)
    net = Language()
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    assign(net)
    net.lm.tie_weights()
    train(lab, net, sgd(net), first=2)


def test_weights_that_the_library_ties_again_between_two_steps_never_came_apart() -> None:
    assert len(verify(tie_again_after_assigning).watch.ties) == 1  # type: ignore[union-attr]
