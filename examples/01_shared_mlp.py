"""Train an MLP with a shared layer on the iris data, and see what the sharing does to parameters and gradients.

A textbook's claims about tied parameters, one after the other, on real data: one tensor under two names, no gradient before the first
backward, one update for both layers, and a gradient that is the sum of what the two uses contribute.
"""

from __future__ import annotations

import copy

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from shared_mlp import SEED, SharedMLP, arguments, iris, loss_of, print_ending
from shared_mlp_lightning import IrisData, LitSharedMLP

from paramwatch import Watch
from paramwatch.lightning import ParamWatch


def main() -> None:
    args = arguments(__doc__.splitlines()[0])

    pl.seed_everything(SEED)
    net = LitSharedMLP()
    before_first_backward = state(net)
    proof = {"before training": add_up_the_uses(net)}

    callback = ParamWatch(uses=10)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[callback, TQDMProgressBar(refresh_rate=15)],
        logger=TensorBoardLogger(args.log_dir, name="shared_mlp"),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(net, IrisData())
    proof["after training"] = add_up_the_uses(net)

    print_inventory(callback.watch)
    print_heading("Before the first backward: values, and no gradient yet")
    print("A new parameter has a value; its gradient is None, which is not the same as zero.\n")
    print(before_first_backward)
    print_layers(callback.watch)
    print_proof(proof)
    print_agreement(callback.watch)
    print_heading("The end")
    print_ending(net, trainer.log_dir, args.log_dir)


def state(net: SharedMLP) -> str:
    """What the book asks of a parameter before any backward: its type, its value, its gradient."""
    bias = net[6].bias
    facts = {
        "type(net[6].bias)": type(bias),
        "net[6].bias": repr(bias).replace("\n", " "),
        "net[6].bias.grad is None": bias.grad is None,
        "all gradients are None": all(parameter.grad is None for parameter in net.parameters()),
        "net[2] is net[4]": net[2] is net[4],
    }
    return "\n".join(f"{question:26} {answer}" for question, answer in facts.items())


def add_up_the_uses(net: SharedMLP) -> dict[str, float]:
    """Untie the shared layer, and compare the two gradients it then has with the one it has when it is shared."""
    measurements, answers = iris()
    untied = torch.nn.Sequential(*net)
    untied[4] = copy.deepcopy(net[4])
    (shared,) = torch.autograd.grad(loss_of(net(measurements), answers), [net[2].weight])
    first, second = torch.autograd.grad(loss_of(untied(measurements), answers), [untied[2].weight, untied[4].weight])
    return {
        "|layer 2|": first.norm().item(),
        "|layer 4|": second.norm().item(),
        "cosine": torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).item(),
        "|2 + 4|": (first + second).norm().item(),
        "|shared|": shared.norm().item(),
        "relative difference": ((first + second - shared).norm() / shared.norm()).item(),
    }


def print_inventory(watch: Watch) -> None:
    parameters = watch.parameters
    names = len(parameters) + parameters["aliases"].map(len).sum()
    print_heading(f"The parameters: {names} names, {len(parameters)} tensors")
    print("Layers 2 and 4 are one nn.Linear: its two tensors have two names each and are counted once.\n")
    table = parameters[["aliases", "shape", "numel", "bytes"]].copy()
    table["aliases"] = table["aliases"].map(", ".join)
    print(table.rename(columns={"aliases": "also known as"}).to_string(), end="\n\n")
    for tie in watch.ties:
        print(tie)
    saved = sum(tie.bytes_saved for tie in watch.ties)
    print(f"In all: {parameters['numel'].sum()} parameters in {parameters['bytes'].sum()} bytes; sharing saves {saved} bytes.")


def print_layers(watch: Watch) -> None:
    layers = watch.frame(by="layer", aliases=True)
    steps = layers.index.unique("step")
    few = [step for step in (0, 1, 10, 50, 100, 200, 300) if step < steps[-1]] + [steps[-1]]
    print_heading("Layer by layer: parameter and gradient norms, weight and bias taken together")
    print("Layers 2 and 4 agree in every line: one tensor, one gradient, one update for both.\n")
    table = layers.loc[few, ["param_norm", "grad_norm"]].unstack("layer")
    print(table.rename_axis(columns=["", "layer"]).to_string(float_format="{:.4f}".format))


def print_proof(proof: dict[str, dict[str, float]]) -> None:
    print_heading("The gradients of the two uses add up")
    print("The same net with an untied copy as layer 4 has two weight gradients, here over all irises.")
    print("Their sum is the gradient of the shared weight. The cosine says whether the two uses pull")
    print("that weight the same way (+1), are unrelated (0) or fight (-1).\n")
    norms = pd.DataFrame(proof).T
    difference = norms.pop("relative difference")
    print(norms.to_string(float_format="{:.4f}".format), end="\n\n")
    for when, value in difference.items():
        print(f"relative difference {when}: {value:.1e}")


def print_agreement(watch: Watch) -> None:
    """The book's question, asked at every tenth step: what each of the two uses of the layer contributed."""
    uses = watch.uses(parameters="2.weight").droplevel("parameter").unstack("use")
    table = pd.concat([uses["use_norm"].add_prefix("|layer ").add_suffix("|"), uses["use_share"].add_prefix("share of ")], axis=1)
    table["agreement"] = watch.agreement(parameters="2.weight").droplevel("parameter")["agreement"]
    print_heading("During training: do layers 2 and 4 agree?")
    print("At every tenth step the gradient of the shared weight was split by use. The shares add up to 1; one")
    print("below 0 was overruled by the other. Agreement is the cosine of the two: +1 agree, -1 fight.\n")
    few = [step for step in (0, 10, 50, 100, 200, 300, 400, 500) if step < table.index[-1]] + [table.index[-1]]
    print(table.loc[few].rename_axis(columns=None).to_string(float_format="{:.4f}".format), end="\n\n")
    values = table["agreement"]
    least, median, most = values.quantile([0, 0.5, 1])
    print(f"Over {len(values)} split steps the agreement was {median:+.2f} in the median, {least:+.2f} to {most:+.2f}, and below 0")
    verdict = "fight" if median <= -0.3 else "agree" if median >= 0.3 else "go their own ways, neither agreeing nor fighting"
    print(f"at {(values < 0).mean():.0%} of the steps. On the whole the two uses {verdict}.")


def print_heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


if __name__ == "__main__":
    main()
