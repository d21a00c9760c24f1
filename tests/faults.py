"""Makes one function of paramwatch fail, in loops that between them enter every one that a watched run enters."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from loops import sgd
from torch import Tensor, nn

import paramwatch
from paramwatch.testing import ListSink
from paramwatch.worker import Worker

HERE = str(Path(paramwatch.__file__).parent / "_").rstrip("_")
PASSES = 2
Pair = tuple[CodeType, CodeType]
"""An entry point and a function."""


class Injector:
    """A trace function: notes what is entered, or makes one function fail, from `arm` to `disarm`.

    It is asked in all threads to note, and where the function can fail otherwise: in the background thread, which has one entry point, or
    in all others. To be asked takes longer than what is asked about.
    """

    def __init__(self, failing: Pair | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.entered: dict[Pair, int] = {}
        self.fired = 0
        self._failing = failing
        self._error = error
        self._armed = False
        self._other: Any = None
        self.asks_thread = failing is None or failing[0] is Worker._run.__code__
        self._asks_others = failing is None or not self.asks_thread

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if not self._armed:
            return
        if self._failing is None:
            if code.co_filename.startswith(HERE):
                entry, depth = _entry(frame)
                self.entered[entry, code] = min(depth, self.entered.get((entry, code), depth))
        elif code is self._failing[1] and _entry(frame)[0] is self._failing[0]:
            self.fired += 1
            raise self._error(f"injected into {code.co_qualname}")

    def arm(self) -> None:
        """From here on; once more after each failure, which ends the tracing of its thread."""
        if not self._armed:
            self._other = sys.gettrace()
        self._armed = True
        if self._asks_others:
            sys.settrace(self)

    def disarm(self) -> None:
        if self._armed and self._asks_others:
            sys.settrace(self._other)
        self._armed = False


def _entry(frame: FrameType) -> tuple[CodeType, int]:
    """The outermost function of paramwatch on the stack, and how many there are down to this one."""
    outermost, depth, above = frame.f_code, 1, frame.f_back
    while above is not None:
        if above.f_code.co_filename.startswith(HERE):
            outermost, depth = above.f_code, depth + 1
        above = above.f_back
    return outermost, depth


# ---- the loops --------------------------------------------------------------------------------


class Run:
    """What a loop is given: a model and its watch, if it is watched."""

    def __init__(self, injector: Injector | None, folder: Path) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
        self.watch: paramwatch.Watch | None = None
        self.losses: list[float] = []
        self.end: list[Tensor] = []
        self.folder = folder
        self._injector = injector

    def attach(self, **options: Any) -> None:
        if self._injector is not None:
            if self._injector.asks_thread:
                threading.settrace(self._injector)
            try:
                self.watch = paramwatch.attach(self.net, **options)
            finally:
                threading.settrace(None)  # type: ignore[arg-type]

    def passes(self) -> Iterator[int]:
        for i in range(PASSES):
            if self._injector is not None:
                self._injector.arm()
            yield i

    def backward(self, i: int) -> Tensor:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
        loss: Tensor = (self.net(x) - 1).square().mean()
        loss.backward()
        self.losses.append(loss.item())
        return loss

    def forget(self) -> None:
        self.end = [param.detach().clone() for param in self.net.parameters()]
        if self._injector is not None:
            self._injector.arm()
        del self.net
        gc.collect()

    def close(self) -> None:
        self.end = [param.detach().clone() for param in self.net.parameters()]
        if self.watch is not None and self._injector is not None:
            self._injector.arm()
            self.watch.close()


def clipping(run: Run) -> None:
    optimizer, scaler = torch.optim.Adam(run.net.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0)
    run.attach(raw_gradients=True, detail="full")
    for i in run.passes():
        optimizer.zero_grad()
        scaler.scale(run.backward(i))
        nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    run.close()


def closures(run: Run) -> None:
    class TwoPasses(torch.optim.SGD):
        def step(self, closure: Any = None, others: Any = ()) -> Any:
            with torch.enable_grad():
                loss = closure()
                for other in others:
                    other()
            base.step()
            return loss

    outer, base = TwoPasses(run.net[0].parameters(), lr=0.1), sgd(run.net)
    run.attach(update="sampled")
    for i in run.passes():

        def closure(i: int = i) -> Tensor:
            base.zero_grad()
            return run.backward(i)

        outer.step(closure, [closure])
    with contextlib.suppress(ZeroDivisionError):
        outer.step(lambda: 1 / 0)
    run.close()


def own_hooks_and_two_optimizers(run: Run) -> None:
    first, second = sgd(run.net[0]), sgd(run.net[2])
    first.register_step_pre_hook(lambda optimizer, args, kwargs: None)
    run.attach(every=2)
    for i in run.passes():
        first.zero_grad()
        second.zero_grad()
        run.backward(i)
        first.step()
        second.step()
    run.close()


def explicit_steps(run: Run) -> None:
    run.net[0].requires_grad_(False)
    run.attach()
    for i in run.passes():
        run.net.zero_grad()
        run.backward(i)
        with torch.no_grad() if run.watch is None else run.watch.step(), torch.no_grad():
            for param in run.net[2].parameters():
                param -= 0.1 * param.grad
    run.close()


def written_to_disk(run: Run) -> None:
    optimizer = sgd(run.net)
    run.attach(log_dir=run.folder, sinks=[ListSink()])
    for i in run.passes():
        optimizer.zero_grad()
        run.backward(i)
        optimizer.step()
    run.close()


def split_by_use(run: Run) -> None:
    optimizer = sgd(run.net)
    run.attach(uses=1, uses_of="*")
    for i in run.passes():
        optimizer.zero_grad()
        one, two = (run.net(x) for x in torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(i)))
        loss = (one - two).square().mean() + run.net[0].weight.square().sum()
        if run.watch is not None:
            run.watch.root(loss)
        loss.backward()
        run.losses.append(loss.item())
        optimizer.step()
    run.close()


def a_model_that_is_gone(run: Run) -> None:
    optimizer = sgd(run.net)
    run.attach()
    for i in run.passes():
        optimizer.zero_grad()
        run.backward(i)
        optimizer.step()
    del optimizer
    run.forget()


LOOPS = (clipping, closures, own_hooks_and_two_optimizers, explicit_steps, written_to_disk, split_by_use, a_model_that_is_gone)


def run_of(loop: Callable[[Run], None], injector: Injector | None, folder: Path) -> Run:
    run = Run(injector, folder)
    try:
        loop(run)
        sys.settrace(None)
        if run.watch is not None:
            # the background thread may not be through
            run.watch.flush()
    finally:
        if injector is not None:
            injector.disarm()
    return run
