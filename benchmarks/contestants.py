"""What people use to see gradients and parameters, side by side with paramwatch at every step, on one torch thread.

python benchmarks/contestants.py [--rounds N]

Each contestant trains a model of its own with the same steps; a package that is not installed is named in the table. They come with
`pip install -e '.[bench]'`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from reporting import arguments, report
from torch import nn
from workloads import TESTS, Hooks, Workload, step_hooks, step_of, take_turns, workloads

import paramwatch

After = Callable[[], object]
Contestant = Callable[[nn.Module, torch.optim.Optimizer, Path], contextlib.AbstractContextManager[After | None]]
"""Attaches itself to a model for as long as the context lasts; gives what it does between `backward` and `step`, if anything."""


@contextlib.contextmanager
def watched(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[None]:
    with paramwatch.attach(net, folder, update="exact"):
        yield None


@contextlib.contextmanager
def naive(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[After]:
    """Eight statistics of each parameter and gradient, one number at a time."""

    def after() -> None:
        for param in net.parameters():
            for x in (param.detach(), param.grad):
                if x is not None:
                    _ = x.norm().item(), x.mean().item(), x.std(correction=0).item(), x.min().item(), x.max().item()
                    _ = (x == 0).sum().item(), x.isnan().sum().item(), x.isinf().sum().item()

    yield after


@contextlib.contextmanager
def lightning_grad_norm(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[After]:
    from pytorch_lightning.utilities import grad_norm

    yield lambda: {name: float(norm) for name, norm in grad_norm(net, 2).items()}


@contextlib.contextmanager
def composer_optimizer_monitor(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[After]:
    """The mathematics of MosaicML Composer's `OptimizerMonitor` (composer/callbacks/optimizer_monitor.py, Apache-2.0), written anew.

    The l2 norms of gradients, parameters and, where the optimizer has them, of its moments and of the step they lead to; one total.
    """

    def after() -> None:
        found = {}
        for name, param in net.named_parameters():
            if param.grad is None:
                continue
            found[f"l2_norm/grad/{name}"] = torch.linalg.vector_norm(param.grad)
            found[f"l2_norm/param/{name}"] = torch.linalg.vector_norm(param.detach())
            state = optimizer.state.get(param, {})
            if "exp_avg_sq" in state:
                found[f"l2_norm/moment/{name}"] = torch.linalg.vector_norm(state["exp_avg"])
                found[f"l2_norm/second_moment_sqrt/{name}"] = torch.linalg.vector_norm(state["exp_avg_sq"].sqrt())
                found[f"l2_norm/update/{name}"] = torch.linalg.vector_norm(state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8))
        numbers = {name: float(norm) for name, norm in found.items()}
        _ = sum(norm**2 for name, norm in numbers.items() if "/grad/" in name) ** 0.5

    yield after


@contextlib.contextmanager
def tensorboard_histograms(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[After]:
    from torch.utils.tensorboard import SummaryWriter

    writer, step = SummaryWriter(str(folder)), iter(range(1 << 62))

    def after() -> None:
        i = next(step)
        for name, param in net.named_parameters():
            writer.add_histogram(name, param, i)
            if param.grad is not None:
                writer.add_histogram(f"{name}.grad", param.grad, i)

    yield after
    writer.close()


@contextlib.contextmanager
def wandb_watch(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[After]:
    import wandb

    run = wandb.init(mode="offline", dir=str(folder), settings=wandb.Settings(silent=True))
    run.watch(net, log="all", log_freq=1)
    yield lambda: run.log({"step": 1})
    run.finish()


@contextlib.contextmanager
def torchlens_watch(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[After]:
    from torchlens import trackers
    from torchlens.observability import WatchSettings

    numbers, current = itertools.count(1), [0]

    def after() -> None:
        current[0] = next(numbers)

    signals, sink = ("gradients", "parameters", "updates"), trackers.JSONLSink(str(folder / "log.jsonl"))
    # its history in memory holds 256 steps, and raises at the next one
    kept = WatchSettings(output_dir=str(folder / "history"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that may change
        session = trackers.watch(net, to=sink, signals=signals, optimizer=optimizer, step=lambda: current[0], every=1, settings=kept)
    yield after
    session.close()


CONTESTANTS: dict[str, tuple[str, Contestant]] = {
    "**paramwatch**, all statistics, update exact": ("paramwatch", watched),
    "naive loop: 8 statistics, `.item()`": ("torch", naive),
    "Lightning `grad_norm`": ("pytorch_lightning", lightning_grad_norm),
    "Composer `OptimizerMonitor` (its mathematics)": ("torch", composer_optimizer_monitor),
    '`wandb.watch(log="all", log_freq=1)`, offline': ("wandb", wandb_watch),
    "TorchLens `watch`: gradients, parameters, updates": ("torchlens", torchlens_watch),
    "TensorBoard `add_histogram`": ("tensorboard", tensorboard_histograms),
}
"""By name: the package it needs, and what it does."""


def results(work: Workload, rounds: int) -> dict[str, str]:
    """Cells of a column."""
    cells: dict[str, str] = {}
    bare = work.make()
    steps = {"bare": step_of(work, bare, work.optimizer(bare))}
    hooks: dict[str, Hooks] = {}
    with contextlib.ExitStack() as stack:
        for name, (package, contestant) in CONTESTANTS.items():
            if importlib.util.find_spec(package) is None:
                cells[name] = f"{package} is not installed"
                continue
            net = work.make()
            optimizer = work.optimizer(net)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            before = step_hooks()
            steps[name] = step_of(work, net, optimizer, stack.enter_context(contestant(net, optimizer, folder)))
            hooks[name] = step_hooks(but=before)
        costs = take_turns(steps, work.block, rounds, hooks)
    return cells | {name: f"{costs[name].wall:.2f} x, {costs[name].more_us:,.0f} µs" for name in steps if name != "bare"}


def table(rounds: int | None = None, tiny: bool = False) -> list[str]:
    """Ratio of wall times to the bare step, and microseconds of CPU more; as Markdown."""
    torch.set_num_threads(1)
    packages = dict.fromkeys(
        package for package, _ in CONTESTANTS.values() if package != "paramwatch" and importlib.util.find_spec(package)
    )
    versions = ", ".join((f"paramwatch {paramwatch.__version__}", *(f"{each} {importlib.metadata.version(each)}" for each in packages)))
    columns = {work.name: results(work, 1 if tiny else rounds or (40 if work.block > 1 else 5)) for work in workloads(tiny)}
    lines = [f"{versions}.", "", f"| each step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns.values())} |" for name in CONTESTANTS]
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.rounds, options.tiny))


if __name__ == "__main__":
    main()
