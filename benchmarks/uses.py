"""What it costs to split the gradients of tied parameters by use: time, memory, and nothing between the steps that are split.

python benchmarks/uses.py [--rounds N] [--only time|memory]

Time: every step watched (default statistics, `update="exact"`), one torch thread; all take turns in one process, and ratios are medians of
what was paired in the same round. `between` is watched with `uses=10**9`, so that after the first step none is split.

Memory: the largest number of bytes that torch's allocator had given out at any moment of a step, above what it had given out when the step
began, as torch's own profiler reports each allocation: gradients, activations, temporaries and what autograd holds while it adds. Not
counted: the parameters, which are there before; what is no tensor (128 KiB a thread while inner products are made, and Python objects).
The profiler loses an event now and then: steps after which more or less than the gradients seems to be left are measured again. In units
of the bytes of the largest shared parameter. Nothing else is watched (`update="off"`), so that the difference is the split's.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from reporting import arguments, report
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_modules
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import GPT, Step, Workload, costs_of, rounds_of, step_of

import paramwatch
from paramwatch.uses import watched

TESTS = ("test_uses.py", "test_uses_cost.py")

SPLIT_AIMS = {"GPT with tied head": "1.10", "12-fold shared block": "1.3"}
"""Of the ratio to the step that is watched and not split."""

CONTESTANTS: dict[str, int | None] = {"bare": None, "watched": 0, "between": 10**9, "split": 1, "bare again": None}
"""By name: the `uses` it is watched with."""


def shared_blocks(times: int = 12, width: int = 192) -> nn.Module:
    """A small ALBERT: one block, used several times, with a tied head."""
    net = GPT(layers=1, width=width)
    net.layers = nn.Sequential(*[net.layers[0]] * times)
    return net


def works(tiny: bool = False) -> list[Workload]:
    """If `tiny`, the smaller one, smaller still."""
    text = torch.randint(8192, (4, 129), generator=torch.Generator().manual_seed(0))

    def loss(net: nn.Module) -> torch.Tensor:
        return functional.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def adamw(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=1e-4)

    works = [Workload("GPT with tied head", GPT, adamw, loss, 1), Workload("12-fold shared block", shared_blocks, adamw, loss, 1)]
    return [replace(works[1], make=lambda: shared_blocks(times=2, width=12))] if tiny else works


# ---- time -----------------------------------------------------------------------------------


def time_of(work: Workload, rounds: int) -> str:
    """Line of the table."""
    nets = {name: work.make() for name in CONTESTANTS}
    steps = {name: step_of(work, net, work.optimizer(net)) for name, net in nets.items()}
    with contextlib.ExitStack() as stack:
        watches = {
            name: stack.enter_context(paramwatch.attach(nets[name], update="exact", uses=uses))
            for name, uses in CONTESTANTS.items()
            if uses is not None
        }
        for name in watches:  # the first step of `between` is split, and operations are counted at one number
            steps[name]()
        taken = rounds_of(steps, work.block, rounds)
        rows = watches["split"].uses(steps=slice(1, 2)).reset_index()
        watches["split"].close()
        counted, installed = dispatched(steps["between"]) - dispatched(steps["watched"]), hooks()
    bare, plain = costs_of(taken, "bare"), costs_of(taken, "watched")
    uses = rows.groupby("parameter")["use"].nunique()
    size = sum(param.numel() for param in nets["bare"].parameters())
    nothing = f"{plain['between'].wall:.3f}, {counted:+d} operations, {installed} hooks"
    return (
        f"| {work.name}, {size:,} elements; rows split: {len(uses)}, uses: {uses.max()} | {bare['bare'].step_us:,.0f} "
        f"| {bare['watched'].wall:.3f} | {bare['split'].wall:.3f} | **{plain['split'].wall:.3f}** | {plain['split'].cpu:.3f} "
        f"| {plain['split'].more_us:,.0f} | {SPLIT_AIMS[work.name]} | {nothing} | {bare['bare again'].wall:.3f} |"
    )


def times(rounds: int, tiny: bool) -> Iterator[str]:
    yield (
        "| model | bare step, µs | watched / bare | split / bare | split / watched, wall | CPU | CPU more, µs | aim "
        "| between / watched | bare again / bare |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for work in works(tiny):
        yield time_of(work, rounds)


class Counting(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # as torch has it
        self.count += 1
        return func(*args, **(kwargs or {}))


def dispatched(step: Step) -> int:
    """How many operations torch dispatches in a step."""
    with Counting() as counting:
        step()
    return counting.count


def hooks() -> int:
    """How many global module hooks there are."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
    return sum(len(getattr(torch_modules, name)) for name in names)


# ---- memory ---------------------------------------------------------------------------------


def peak_bytes(step: Step, net: nn.Module) -> int | None:
    """The most that torch's allocator had given out during a step, more than when it began; gradients are gone by then.

    None where not all of it was seen.
    """
    # what an earlier model had is not to be given back meanwhile
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
    finally:
        gc.enable()
    assert profiled.profiler is not None
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    given = most = 0
    for each in sorted(events, key=lambda each: each.start_ns()):
        given += each.nbytes()
        most = max(most, given)
    left = sum(parameter.grad.nbytes for parameter in net.parameters() if parameter.grad is not None)
    return most if abs(given - left) < 0.01 * left else None


@contextlib.contextmanager
def budget(size: int | None) -> Iterator[None]:
    """Contributions may take this many bytes beyond what autograd takes itself; None for what is so by default."""
    before = watched.LEAST_BUDGET, watched.share_of_device
    if size is not None:
        watched.LEAST_BUDGET, watched.share_of_device = size, lambda device: 0
    try:
        yield
    finally:
        watched.LEAST_BUDGET, watched.share_of_device = before


class Repeated(nn.Module):
    """One layer, used several times."""

    def __init__(self, times: int, width: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(width, width, bias=False), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


def repeated(times: int) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor]]:
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    return lambda: Repeated(times, 1024), lambda net: net(x).square().mean()


ATTEMPTS = 30
"""At a measurement from which the profiler has lost nothing."""


def peaks(make: Callable[[], nn.Module], loss: Callable[[nn.Module], torch.Tensor], allowed: float | None, unit: int) -> tuple[str, ...]:
    """Cells: plain, split at the first step, split at later ones, and how it was told."""
    first, later, modes = dict[bool, int](), dict[bool, int](), list[str]()
    for split in (False, True):
        for _ in range(ATTEMPTS):
            net = make()
            work = Workload("", make, lambda net: torch.optim.SGD(net.parameters(), lr=1e-3), loss, 1)
            step = step_of(work, net, work.optimizer(net))
            with contextlib.ExitStack() as stack:
                stack.enter_context(budget(None if allowed is None else int(allowed * unit)))
                watch = stack.enter_context(paramwatch.attach(net, update="off", uses=1, uses_of="*")) if split else None
                found = []
                for _ in range(4):
                    net.zero_grad()
                    found.append(peak_bytes(step, net))
                if watch is not None:
                    modes = sorted(watch.uses()["mode"].unique())
            for kept, seen in ((first, found[:1]), (later, found[1:])):
                if whole := [peak for peak in seen if peak is not None]:
                    kept.setdefault(split, max(whole))
            if split in first and split in later:
                break
        else:
            raise RuntimeError(f"the profiler lost something in each of {ATTEMPTS} attempts")
    cells = (later[False], first[True], later[True])
    return *(f"{peak / unit:.2f}" for peak in cells), ", ".join(f"`{mode}`" for mode in modes)


def memory(tiny: bool) -> Iterator[str]:
    yield "| model | budget beyond autograd's own | plain | split, first step | split, later steps | mode |"
    yield "|---|---|---|---|---|---|"
    gpt, head, unit = works()[0], GPT().head.weight.nbytes, 4 * 1024**2
    cases = [("GPT with tied head, K = 2", gpt.make, gpt.loss, None, head), ("the same", gpt.make, gpt.loss, 0.0, head)]
    for times, allowed in ((2, None), (2, 0.0), (12, None), (12, 1.0), (12, 0.0)):
        cases.append((f"one layer used {times} times", *repeated(times), allowed, unit))
    for name, make, loss, allowed, unit in cases[2:3] if tiny else cases:
        cells = peaks(make, loss, allowed, unit)
        yield f"| {name} | {'256 MB or 2 %' if allowed is None else f'{allowed:.0f}'} | {' | '.join(cells)} |"


# ---- both -----------------------------------------------------------------------------------


def table(rounds: int = 15, only: str = "", tiny: bool = False) -> list[str]:
    """Both tables, as Markdown."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lines = [] if only == "memory" else [*times(1 if tiny else rounds, tiny), ""]
        return lines if only == "time" else [*lines, "Peak of a step in units of the shared parameter:", "", *memory(tiny)]
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of each contestant")
    parser.add_argument("--only", choices=("time", "memory"), default="")
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.rounds, options.only, options.tiny))


if __name__ == "__main__":
    main()
