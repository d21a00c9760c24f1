"""Models of Hugging Face's libraries: adapters added and merged, embeddings resized, and their ties split by use."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changing import MLP, assert_rows, assign, train
from harness import LR, Lab, verify
from loops import mlp, sgd
from torch import nn
from untied import assert_contributions, multiplied, multiplied_for

import paramwatch
from paramwatch.testing import ListSink

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


# ---- ties, split by use -----------------------------------------------------------------------

Made = tuple[nn.Module, nn.Module, dict[str, dict[str, str]]]
"""A model, one with a copy of each parameter for each use, and of each split row the uses with the name of the copy."""

SMALL = {"vocab_size": 32, "tie_word_embeddings": True}


def gpt2() -> Made:
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0, **SMALL)
    net = transformers.GPT2LMHeadModel(config)
    twin = apart(net, "lm_head")
    return net, twin, {"transformer.wte.weight": {"transformer.wte": "transformer.wte.weight", "lm_head": "lm_head.weight"}}


def t5() -> Made:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    net = transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **sizes, **SMALL))
    uses = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    return net, apart(net, *uses), {"shared.weight": {use: f"{use}.weight" for use in uses}}


def albert() -> Made:
    sizes = {"embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}

    def made(groups: int) -> nn.Module:
        config = transformers.AlbertConfig(num_hidden_groups=groups, max_position_embeddings=8, **sizes, **SMALL)
        return transformers.AlbertForMaskedLM(config)

    net, twin, block = made(1), made(3), "albert.encoder.albert_layer_groups."
    for layers in twin.albert.encoder.albert_layer_groups:
        layers.load_state_dict(net.albert.encoder.albert_layer_groups[0].state_dict())
    rest = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith(block)}
    twin.load_state_dict(rest, strict=False)
    words, head = "albert.embeddings.word_embeddings", "predictions.decoder"
    uses = {f"{words}.weight": {words: f"{words}.weight", head: f"{head}.weight"}}
    for name, _ in net.albert.encoder.albert_layer_groups[0].named_parameters():
        place = f"{block}0.{name.rpartition('.')[0]}"
        uses[f"{block}0.{name}"] = {f"{place}@{i}": f"{block}{i}.{name}" for i in range(3)}
    return net, apart(twin, head), uses


def apart(net: nn.Module, *names: str) -> nn.Module:
    """A copy in which these modules have weights of their own."""
    twin = copy.deepcopy(net)
    for name in names:
        layer = copy.copy(twin.get_submodule(name))
        layer._parameters = {key: None if p is None else nn.Parameter(p.detach().clone()) for key, p in layer._parameters.items()}
        parent, _, key = name.rpartition(".")
        setattr(twin.get_submodule(parent), key, layer)
    return twin


@pytest.mark.parametrize("make", [gpt2, t5, albert])
def test_contributions_are_those_of_the_untied_language_model_bit_for_bit(make: Callable[[], Made]) -> None:
    torch.manual_seed(0)
    net, twin, uses = make()
    words, sink, bare = torch.randint(32, (2, 8)), ListSink(), copy.deepcopy(net)
    with multiplied() as seen, paramwatch.attach(net, uses=1, uses_of=list(uses), sinks=[sink]) as watch:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for each in (net, twin, bare):
            # with dropout, the same in both
            torch.manual_seed(1)
            each(input_ids=words, labels=words).loss.backward()
        optimizer.step()

    assert not watch.recorder.splits.guard.failed  # type: ignore[union-attr]
    mine, true = dict(net.named_parameters()), dict(twin.named_parameters())
    assert all(torch.equal(mine[name].grad, parameter.grad) for name, parameter in bare.named_parameters())
    (record,) = sink.records
    assert {row: split.uses for row, split in record.uses.items()} == {row: tuple(named) for row, named in uses.items()}
    for row, split in record.uses.items():
        found, total = multiplied_for(mine[row].grad, seen)
        assert_contributions(split, found, total, [true[copied].grad for copied in uses[row].values()], mine[row].grad)
