"""Three things that only the split of a tied gradient shows, each in a small training of its own.

A parameter that is used in several places has one gradient, the sum of what its uses contribute. The sum can look healthy while one use
drowns another, while most uses contribute nothing, or while two of them cancel. `attach(net, uses=N)` keeps the terms.
"""

from __future__ import annotations

import argparse

import pandas as pd
import tied_discriminator
import tied_language
import tied_time
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--effort", type=float, default=1.0, metavar="SHARE", help="share of the training steps to make, 0.1 or more")
    effort = max(parser.parse_args().effort, 0.1)
    # such small models are no work for several
    torch.set_num_threads(1)

    heading("1. A tied language model: early on, the head drowns the embedding")
    print("One matrix takes words in and tells the next word, learning from Python's own help texts.")
    print("Its gradient has two terms. agreement: +1 they pull the same way, 0 unrelated, -1 they fight.\n")
    found = tied_language.table(tied_language.train(int(300 * effort) + 1))
    show(found, (0, 5, 10, 20, 30, 50, 100, 200, 300))
    most = found["head / embed"].idxmax()
    print(f"\nThe head pulls up to {found['head / embed'].max():.0f} times as hard as the embedding (step {most}),")
    print(f"and {found['head / embed'].iloc[-1]:.1f} times as hard at the end: early on the matrix is trained as a head.")

    heading("2. A recurrent cell: its gradient is healthy, and comes from the last moments only")
    print("The cell reads 60 numbers and has to recall the first one. weight_hh is used 60 times.")
    print("horizon: how many of the last moments hold 99 % of what all contribute.\n")
    steps = int(20 * effort) + 1
    found = tied_time.table(tied_time.train(steps, orthogonal=False), tied_time.train(steps, orthogonal=True))
    print(found.to_string(float_format="{:.2g}".format))
    print("\nWith PyTorch's own initialisation no signal reaches the moments that matter. The gradient norms,")
    print("which are all that other monitors show, do not tell the two apart.")

    heading("3. A discriminator: real and fake halves cancel")
    print("It is called on real points and on fakes before one backward: call0 and call1.\n")
    found = tied_discriminator.table(tied_discriminator.train(int(1000 * effort) + 1))
    show(found, (0, 10, 50, 100, 200, 500, 1000))
    worst = found["coherence"].idxmin()
    print(f"\nAt step {worst} two forces of {found['|real|'][worst]:.2f} and {found['|fake|'][worst]:.2f} leave a gradient of", end=" ")
    print(f"{found['grad_norm'][worst]:.2f}: {found['coherence'][worst]:.0%} of their size.")


def show(table: pd.DataFrame, steps: tuple[int, ...]) -> None:
    """These steps and the last one."""
    few = [step for step in steps if step in table.index]
    print(table.loc[few if few[-1] == table.index[-1] else [*few, table.index[-1]]].to_string(float_format="{:.3f}".format))


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


if __name__ == "__main__":
    main()
