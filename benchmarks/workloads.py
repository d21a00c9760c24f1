"""What is trained in the benchmarks, and how contestants take turns: all in one process, paired with the bare step of the same round.

Torch's global step hooks are called for every optimizer of the process. While a contestant takes its turn only its own are there: otherwise
each would pay for being a stranger to the others, and the bare step would not be bare.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch.nn import functional

Step = Callable[[], None]

Hooks = list[dict[int, Callable[..., object]]]
"""As in `_REGISTRIES`."""

TESTS = (
    *("test_native.py", "test_measure.py", "test_plan.py", "test_streak.py", "test_batching.py"),
    *("test_truth_plain.py", "test_truth_closures.py"),
)
"""Of a step that is watched."""

_REGISTRIES = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)


@dataclass
class Workload:
    """A model, and what one training step of it does.

    Attributes:
        name: For the table.
        make: Gives a new model.
        optimizer: Makes its optimizer.
        loss: Of the model on the one batch there is.
        block: Steps that are timed together.
    """

    name: str
    make: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss: Callable[[nn.Module], Tensor]
    block: int


def shared_mlp() -> nn.Sequential:
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 1))


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outside) for _ in range(2)])
        plain = stride == 1 and inside == outside
        self.beside = (
            nn.Sequential() if plain else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(functional.relu(self.norms[0](self.first(x)))))
        return functional.relu(y + self.beside(x))


def cnn() -> nn.Module:
    """The layout of ResNet-18 for images of 32 x 32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inside = 64
    for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(inside, outside, stride), Residual(outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.mixed(self.before(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    def __init__(self, layers: int = 6, width: int = 384, vocabulary: int = 8192, length: int = 128, heads: int = 6) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Attention(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor = self.head(self.norm(self.layers(self.tokens(x) + self.places.weight[: x.shape[1]])))
        return seen


def workloads(tiny: bool = False) -> list[Workload]:
    """The three of the tables, from small to large; if `tiny`, two steps of the smallest."""
    noise = torch.Generator().manual_seed(0)
    x, images = torch.randn(64, 4, generator=noise), torch.randn(32, 3, 32, 32, generator=noise)
    classes, text = torch.randint(10, (32,), generator=noise), torch.randint(8192, (4, 129), generator=noise)

    def sgd(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=1e-3)

    def momentum(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)

    def adamw(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=1e-4)

    works = [
        Workload("shared MLP", shared_mlp, sgd, lambda net: net(x).square().mean(), 50),
        Workload("CNN, ResNet-18 layout", cnn, momentum, lambda net: functional.cross_entropy(net(images), classes), 1),
        Workload("GPT", GPT, adamw, lambda net: functional.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()), 1),
    ]
    return [replace(works[0], block=2)] if tiny else works


def step_of(work: Workload, net: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], object] | None = None) -> Step:
    """One training step.

    Args:
        work: Says what the loss is.
        net: Is trained.
        optimizer: Of it.
        after: What a contestant does between `backward` and `step`.
    """

    def step() -> None:
        optimizer.zero_grad()
        work.loss(net).backward()
        if after is not None:
            after()
        optimizer.step()

    return step


@dataclass(frozen=True)
class Cost:
    """Of a step of a contestant, against the bare step of the same round: medians over the rounds."""

    wall: float
    """Ratio of wall times,"""
    cpu: float
    """and of the CPU times of the whole process, the threads in the background included."""
    more_us: float
    """Microseconds of CPU more."""
    step_us: float
    """Wall time of the step."""


Taken = dict[str, list[tuple[float, float]]]
"""Wall and CPU seconds of a step, by contestant, round by round."""


def take_turns(steps: Mapping[str, Step], block: int, rounds: int, hooks: Mapping[str, Hooks]) -> dict[str, Cost]:
    """Time blocks of steps in random order, round by round; the first contestant is the bare step.

    Args:
        steps: By contestant.
        block: Steps that are timed together.
        rounds: Blocks of each.
        hooks: The global step hooks of those that have some.
    """
    return costs_of(rounds_of(steps, block, rounds, hooks), next(iter(steps)))


def rounds_of(steps: Mapping[str, Step], block: int, rounds: int, hooks: Mapping[str, Hooks] | None = None) -> Taken:
    """The times of `take_turns`, after one block of each that is not counted. Without `hooks` all hooks are there all the time."""
    names, order = list(steps), random.Random(0)
    taken: Taken = {name: [] for name in names}

    def timed(name: str) -> tuple[float, float]:
        with contextlib.nullcontext() if hooks is None else _only(hooks.get(name, [{}, {}])):
            return _time(steps[name], block)

    for name in names:
        timed(name)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            taken[name].append(timed(name))
    return taken


def step_hooks(but: Hooks | None = None) -> Hooks:
    """Torch's global step hooks as they are now, but for some."""
    others = but or [{}, {}]
    return [{key: hook for key, hook in now.items() if key not in other} for now, other in zip(_REGISTRIES, others, strict=True)]


@contextlib.contextmanager
def _only(hooks: Hooks) -> Iterator[None]:
    before = step_hooks()
    _put(hooks)
    try:
        yield
    finally:
        _put(before)


def _put(hooks: Hooks) -> None:
    for registry, wanted in zip(_REGISTRIES, hooks, strict=True):
        registry.clear()
        registry.update(wanted)


def costs_of(taken: Taken, bare: str) -> dict[str, Cost]:
    """What each contestant costs against the one that is called bare here."""
    found = {}
    for name, times in taken.items():
        pairs = list(zip(times, taken[bare], strict=True))
        found[name] = Cost(
            statistics.median(mine[0] / other[0] for mine, other in pairs),
            statistics.median(mine[1] / other[1] for mine, other in pairs),
            statistics.median(mine[1] - other[1] for mine, other in pairs) * 1e6,
            statistics.median(mine[0] for mine in times) * 1e6,
        )
    return found


def _time(step: Step, block: int) -> tuple[float, float]:
    """Wall and CPU seconds of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(block):
        step()
    return (time.perf_counter() - wall) / block, (time.process_time() - cpu) / block
