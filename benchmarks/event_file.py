"""What the TensorBoard event file takes of a training: of a loop of pure Python beside it, and of a processor.

python benchmarks/event_file.py [--pairs N]

Real rounds of a real model are recorded once and then handed, with new step numbers, to two background threads, of which one has the event
file as its only sink and the other none, at the rate of a training. Short stretches of both take turns, and each lasts until its thread has
caught up, the loop going on meanwhile: nothing the thread does goes uncounted.

Speed is turns of the loop a second, that of all stretches together, so that what happens now and then (heat maps, files written out) counts
as well. A second is one in which the loop ran or waited for the interpreter. Where Linux tells how long it waited for a processor that
another program had, that is left out, since it says nothing about either variant. The interval is the middle 95 % of what comes out when
the pairs of stretches are drawn anew, with replacement (Efron 1979).

The time of the background threads themselves is processor time, which what else the machine does hardly changes: the loop can lose that and
a few switches between threads, and loses less, since most of it is spent outside the interpreter.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from reporting import arguments, report
from torch import nn

from paramwatch import steps
from paramwatch.columns import LAYOUTS
from paramwatch.guard import Guard
from paramwatch.inventory import LiveInventory
from paramwatch.recorder import Recorder
from paramwatch.rounds import Round
from paramwatch.tensorboard.events import EventFile
from paramwatch.worker import Worker

TESTS = ("test_events.py", "test_worker.py")

STEP_MS = 10.0
"""A step of the pure Python loop, about: what a training step of 300 tensors takes at the very least."""

STRETCH = 50
"""Steps of one variant before the other has its turn: half a second of them, after which the background thread is asked to catch up."""

RECORDED = 128
"""Rounds."""

DRAWN = 2000
"""How often the pairs are drawn anew."""

TURNS = 20
"""Parts of a step, after each of which it may be seen that the thread has caught up."""


def rounds_of(rows: int) -> list[Round]:
    """Rounds of a model with so many rows, in blocks of a plain transformer's size."""
    net = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))) for _ in range(-(-rows // 10)))})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found: list[Round] = []
    live = LiveInventory(net, ["*"], [], LAYOUTS["default"])
    recorder = Recorder(live, Guard("", lambda: None), found.append, every=1, update="exact")
    steps.register(recorder)
    try:
        for _ in range(RECORDED):
            for param in net.parameters():
                param.grad = torch.randn_like(param)
            optimizer.step()
    finally:
        steps.unregister(recorder)
    recorder.finish()
    # those after the last power of two, the steps at which all is looked at anew: in a long run nearly all are like these
    return found[RECORDED // 2 + 2 : RECORDED]


def handed_over(rounds: list[Round]) -> Iterator[Round]:
    """The same rounds over and over, each with a number and a time of its own."""
    step = 0
    while True:
        for done in rounds:
            other = copy(done)
            other.step, other.time = step, time.time()
            yield other
            step += 1


def turn(n: int) -> int:
    """Work for the interpreter alone."""
    total = 0
    for i in range(n):
        total += i * i & 7
    return total


def waited_for_a_processor() -> float:
    """Seconds for which this thread could have run, but for other programs; 0 where nobody counts them."""
    file = Path("/proc/thread-self/schedstat")
    return int(file.read_text().split()[1]) / 1e9 if file.exists() else 0.0


def speed_kept(pairs: Sequence[tuple[Stretch, Stretch]]) -> float:
    """Speed beside the event file, relative to that without it."""
    bare, beside = (sum(each.turns for each in side) / sum(each.seconds for each in side) for side in zip(*pairs, strict=True))
    return beside / bare


@dataclass
class Stretch:
    """What was measured of one."""

    turns: int
    seconds: float
    handing_us: float
    """Of the training thread, a step."""
    thread_us: float
    """Of the background thread, a step."""


def stretch(worker: Worker, rounds: Iterator[Round], n: int, steps: int) -> Stretch:
    """Some steps, until all of them are written."""
    clock: list[float] = []
    worker.call(lambda: clock.append(time.thread_time()))
    handing, turns, caught_up = [], 0, threading.Event()
    start, waited = time.perf_counter(), waited_for_a_processor()
    for _ in range(steps):
        for _ in range(TURNS):
            turn(n)
        turns += TURNS
        done = next(rounds)
        before = time.perf_counter()
        worker.submit(done, "exact")
        handing.append(time.perf_counter() - before)
    worker.later(lambda: (clock.append(time.thread_time()), caught_up.set())[0])
    while not caught_up.is_set():
        turn(n)
        turns += 1
    took = time.perf_counter() - start - (waited_for_a_processor() - waited)
    return Stretch(turns, took, statistics.median(handing) * 1e6, (clock[1] - clock[0]) / steps * 1e6)


def compare(rows: int, pairs: int, steps: int) -> str:
    """A line of the table."""
    n = 10_000
    start = time.perf_counter()
    turn(n)
    n = int(n * STEP_MS / TURNS / 1e3 / (time.perf_counter() - start))
    with tempfile.TemporaryDirectory() as folder:
        guard = Guard("", lambda: None)
        bare, beside = workers = [Worker(sinks, [], lambda findings: None, guard) for sinks in ([], [EventFile(Path(folder))])]
        feeds = {worker: handed_over(rounds_of(rows)) for worker in workers}
        measured = []
        for i in range(pairs):
            order = workers if i % 2 else workers[::-1]
            both = {worker: stretch(worker, feeds[worker], n, steps) for worker in order}
            measured.append((both[bare], both[beside]))
        for worker in workers:
            worker.stop(wait=True)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    rng = random.Random(0)
    drawn = sorted(speed_kept(rng.choices(measured, k=pairs)) for _ in range(DRAWN))
    low, high = drawn[DRAWN // 40], drawn[-DRAWN // 40 - 1]
    median = statistics.median(mine.turns / mine.seconds / (other.turns / other.seconds) for other, mine in measured)
    handing = statistics.median(mine.handing_us for _, mine in measured)
    more = [mine.thread_us - other.thread_us for other, mine in measured]
    cells = (
        f"{rows:,}",
        f"**{speed_kept(measured):.1%}** ({low:.1%} to {high:.1%})",
        f"{median:.1%}",
        f"{handing:.1f}",
        f"{more[0]:.0f}",
        f"{statistics.mean(more):.0f} ({statistics.mean(more) / STEP_MS / 10:.1f} %)",
        f"{size / steps / pairs:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def table(pairs: int = 60, tiny: bool = False) -> list[str]:
    """The table, as Markdown."""
    torch.set_num_threads(1)
    pairs, steps = (1, 2) if tiny else (pairs, STRETCH)
    header = (
        *(
            "rows",
            "speed the loop keeps beside the event file (95 % interval)",
            "median of the pairs",
            "handing a step over, µs of the training thread",
        ),
        *("background thread more, µs a step of the first stretch", "of all (of the time of a step)", "bytes a step"),
    )
    return [
        f"TensorBoard {version('tensorboard')}; steps of {STEP_MS:.0f} ms of pure Python, {pairs} pairs of {steps} steps.",
        "Aims: 97 % of the speed, 300 µs of the training thread.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(compare(rows, pairs, steps) for rows in ((8,) if tiny else (8, 300, 1500))),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=60, help="pairs of stretches")
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.pairs, options.tiny))


if __name__ == "__main__":
    main()
