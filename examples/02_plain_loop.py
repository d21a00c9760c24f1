"""The training of `01_shared_mlp.py` in a plain loop: one line attaches paramwatch, and every number comes out the same."""

from __future__ import annotations

import torch
from shared_mlp import LEARNING_RATE, SEED, SharedMLP, arguments, batches, loss_of, print_ending

import paramwatch


def main() -> None:
    args = arguments("Train the MLP with a shared layer on the iris data in a plain loop.")
    run = args.log_dir / "plain_loop"

    torch.manual_seed(SEED)
    net = SharedMLP()
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    watch = paramwatch.attach(net, run)

    loader = batches()
    for _ in range(args.epochs):
        for measurements, answers in loader:
            optimizer.zero_grad()
            loss_of(net(measurements), answers).backward()
            optimizer.step()
    watch.close()

    print("Each optimizer step was recorded without touching the loop. The gradient norms of the last five:\n")
    print(watch.frame("grad_norm").tail().to_string(float_format="{:.4f}".format), end="\n\n")
    print_ending(net, run, args.log_dir)


if __name__ == "__main__":
    main()
