"""Tensors of every kind that torch has: measured rightly, or named unsupported; never an exception and never a wrong number."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import truth
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import paramwatch
from paramwatch import measure
from paramwatch.columns import PARTS
from paramwatch.measure import naive

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
NUMBERS = {name for name, dtype in DTYPES.items() if dtype.is_floating_point or dtype.is_complex} - {"float4_e2m1fn_x2"}
READABLE = NUMBERS | {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
"""Of the others torch knows the name and little else."""

UPDATES = ("exact", "sampled")


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 3


def reals(tensor: Tensor) -> np.ndarray:
    """The elements in float64."""
    return truth.reals(tensor.to(torch.complex64) if tensor.dtype is torch.complex32 else tensor)


class Owner:
    """Stands for an optimizer of one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.param_groups = [{"params": [tensor]}]


class Odd(nn.Module):
    """A model with one odd tensor, beside which another is trained as ever."""

    def __init__(self, odd: Tensor) -> None:
        super().__init__()
        self.odd = odd if isinstance(odd, nn.Parameter) else nn.Parameter(odd, requires_grad=False)
        self.plain = nn.Linear(2, 1)


def watched(net: Odd, change: Callable[[], object] = lambda: None, **options: Any) -> tuple[str, pd.Series[Any]]:
    """What a watch says of the odd tensor's dtype, and of a step that changes it; nothing failed, and the plain one is seen as ever."""
    watch = paramwatch.attach(net, **options)
    optimizer = torch.optim.SGD(net.plain.parameters(), lr=0.5)
    for i in range(2):
        optimizer.zero_grad()
        net.plain(torch.ones(3, 2)).sum().backward()
        optimizer.step()
        with watch.step(Owner(net.odd)):
            (change if i == 1 else bool)()
    watch.close()
    assert not watch.recorder.guard.failed
    assert not set(watch.findings["rule"]) & {"changed_outside", "tie_broken", "dead_optimizer"}
    np.testing.assert_allclose(watch.frame("grad_norm")["plain.weight"], np.sqrt(18), rtol=1e-6)
    assert len(watch.steps) == 2
    return str(watch.parameters.loc["odd", "dtype"]), watch.frame().loc[(1, "odd")]


def assert_line(line: pd.Series[Any], before: np.ndarray, after: np.ndarray) -> None:
    """All that a line says of a tensor, recomputed in float64."""
    known = truth.Truth({"odd": before}, {}, {"odd": after}, {})
    expected = truth.columns(known, "odd")
    for column, found in line.drop(["lr", "grad_state"]).items():
        if column in ("grad_raw_norm", "clip_coef", "update_abs_max") or column.startswith("exp_avg"):
            continue
        want = expected[str(column)]
        if np.isnan(want):
            assert pd.isna(found), f"{column}: {found}"
            continue
        exact = float(np.float32(want)) if str(column).endswith(("_min", "_max")) else want
        assert abs(found - exact) <= truth.tolerance(str(column), known, "odd", False), f"{column}: {found}, truly {exact}"


def assert_nothing_known(net: Odd, update: Any, dtype: str) -> None:
    said, line = watched(net, update=update, detail="full")
    assert said == dtype
    assert line.drop("grad_state").isna().all()


def filled(dtype: torch.dtype, n: int, seed: int = 0) -> Tensor:
    """Elements of this dtype; of those that cannot be filled, whatever was there."""
    if str(dtype).removeprefix("torch.") in READABLE:
        values = torch.complex(noise(n, seed), noise(n, seed + 7)) if dtype.is_complex else noise(n, seed)
        return (values if dtype.is_signed else values.abs()).to(dtype)
    return torch.empty(n, dtype=dtype)


# ---- dtypes -----------------------------------------------------------------------------------


# dtypes that torch warns of
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.* are deprecated:UserWarning")
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("n", [37, 5000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_measured_rightly_or_named(dtype: torch.dtype, n: int, update: Any) -> None:
    name = str(dtype).removeprefix("torch.")
    net = Odd(filled(dtype, n))
    if name not in READABLE:
        assert_nothing_known(net, update, f"{name} (unsupported)")
        return
    before, then = reals(net.odd), filled(dtype, n, 1)
    said, line = watched(net, lambda: net.odd.data.copy_(then), update=update, detail="full")

    assert said == name
    if update == "sampled" and n > measure.SAMPLE:
        # an estimate; it is never far off where elements move independently of their place
        moved = float(np.linalg.norm(reals(then) - before))
        assert line["update_norm"] == pytest.approx(moved, rel=0.05)
        line = line.drop(["update_norm", "update_ratio"])
    assert_line(line, before, reals(then))


@pytest.mark.parametrize("code", ["float8_e4m3fn", "float8_e5m2"])
def test_every_number_of_a_float8_is_read_as_its_bits_say(code: str) -> None:
    bits = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    exponents, mantissas, bias = (4, 3, 7) if code == "float8_e4m3fn" else (5, 2, 15)
    numbers = []
    for byte in range(256):
        exponent, fraction = byte >> mantissas & (1 << exponents) - 1, (byte & (1 << mantissas) - 1) / (1 << mantissas)
        number = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        if exponent == (1 << exponents) - 1 and (code == "float8_e5m2" or fraction == 0.875):
            number = np.inf if code == "float8_e5m2" and fraction == 0 else np.nan
        numbers.append(-number if byte >> 7 else number)
    tensor = bits.view(getattr(torch, code))
    finite = np.array(numbers)[np.isfinite(numbers)]

    kept = bits[torch.from_numpy(np.isfinite(numbers))].view(tensor.dtype)
    assert_line(watched(Odd(kept), detail="full")[1], finite, finite)
    np.testing.assert_array_equal(naive.as_reals(tensor).numpy(), numbers)


# ---- layouts and subclasses -------------------------------------------------------------------


class Tagged(Tensor):
    """A subclass that sees each function it is given to, and stays itself."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Refusing(Tensor):
    """A subclass that knows nothing but its own form, and says so in its own way."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("to", "clone", "dequantize", "reshape"):
            raise ValueError("not me")
        return super().__torch_function__(func, types, args, kwargs or {})


def grid(seed: int = 0) -> Tensor:
    return noise(24, seed).reshape(4, 6)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "coo": lambda seed: grid(seed).relu().to_sparse(),
    "not coalesced": lambda seed: torch.sparse_coo_tensor([[0, 2, 0]], noise(3, seed), (5,), check_invariants=True),
    "hybrid": lambda seed: torch.sparse_coo_tensor([[0, 2, 0]], noise(6, seed).reshape(3, 2), (5, 2), check_invariants=True),
    "nothing stored": lambda seed: torch.zeros(4, 6).to_sparse(),
    "NaN and infinity stored": lambda seed: torch.tensor([0.0, np.nan, seed, np.inf, 0.0]).to_sparse(),
    "sparse complex": lambda seed: torch.complex(grid(seed).relu(), grid(seed).relu()).to_sparse(),
    "csr": lambda seed: grid(seed).to_sparse_csr(),
    "bsr": lambda seed: grid(seed).to_sparse_bsr((2, 2)),
    "mkldnn": lambda seed: grid(seed).to_mkldnn(),
    "complex conjugate": lambda seed: torch.complex(grid(seed), grid(seed + 1)).conj(),
    "negative view": lambda seed: torch.complex(grid(seed), grid(seed + 1)).conj().imag,
    "expanded": lambda seed: noise(4, seed)[:, None].expand(4, 6),
    "transposed": lambda seed: grid(seed).t(),
    "every other": lambda seed: noise(48, seed)[::2],
    "channels last": lambda seed: noise(48, seed).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
    "0-dim": lambda seed: noise(1, seed)[0],
    "empty": lambda seed: torch.empty(0, 3),
    "tagged": lambda seed: grid(seed).as_subclass(Tagged),
    "subclass of Parameter": lambda seed: type("Own", (nn.Parameter,), {})(grid(seed)),
    "made in inference mode": torch.inference_mode()(grid),
}


def dense(x: Tensor) -> np.ndarray:
    x = x.detach().as_subclass(Tensor) if x.layout is torch.strided else x.detach().to_dense()
    return truth.reals(x.resolve_conj().resolve_neg())


# what torch says of a layout
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_every_kind_is_measured_as_its_dense_equal(make: Callable[[int], Tensor], update: Any) -> None:
    net = Odd(make(1))
    before, then = dense(net.odd), make(2)

    def change() -> None:
        if net.odd.layout in (torch.sparse_csr, torch.sparse_bsr):
            # their data cannot be set
            net.odd.copy_(then)
        else:
            net.odd.data = then.data

    said, line = watched(net, change, update=update, detail="full")

    assert "unsupported" not in said
    assert_line(line, before, dense(then))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.empty(3, 4, device="meta"), id="meta"),
        pytest.param(lambda: TwoTensor(grid(), grid()), id="around two tensors"),
        pytest.param(lambda: torch.sparse_coo_tensor([[0], [1]], [1.0], (10**6, 10**6), check_invariants=True), id="sparse and huge"),
        pytest.param(lambda: nn.Parameter(grid(), requires_grad=False).as_subclass(Refusing), id="refusing"),
    ],
)
def test_what_cannot_be_read_is_named(make: Callable[[], Tensor], update: Any) -> None:
    odd = make()
    net = Odd(torch.zeros(()))
    # past the constructor of Parameter, which not every subclass survives
    odd._is_param = True
    net._parameters["odd"] = odd
    assert_nothing_known(net, update, "float32 (unsupported)")


class NotReadyError(Exception):
    """A class of its own."""


class Scaled(Tensor):
    """Integers and a scale, which may be loaded later: as quantised weights are held."""

    whole: Tensor
    scale: float | None

    @staticmethod
    def __new__(cls, whole: Tensor, scale: float | None) -> Scaled:
        made: Scaled = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)  # type: ignore[attr-defined]  # private
        made.whole, made.scale = whole, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].whole, args[0].scale)
        raise NotReadyError(str(func))

    def dequantize(self) -> Tensor:
        if self.scale is None:
            raise NotReadyError("the scale is not loaded yet")
        return self.whole.float() * self.scale


@pytest.mark.parametrize("options", [{"update": "exact"}, {"update": "sampled"}, {"detail": "full", "histograms": 1}], ids=str)
@pytest.mark.parametrize("scales", [(None, 0.5), (0.5, None), (None,)], ids=str)
def test_each_tensor_of_a_subclass_is_asked_by_itself_and_again(scales: tuple[float | None, ...], options: dict[str, Any]) -> None:
    net = Odd(torch.zeros(()))
    for i, scale in enumerate(scales):
        net.register_parameter(f"w{i}", nn.Parameter(Scaled(torch.full((4, 5), 2, dtype=torch.int8), scale), requires_grad=False))
    watch = paramwatch.attach(net, **options)
    said = watch.parameters["dtype"]
    optimizer = torch.optim.SGD([*net.plain.parameters(), *(getattr(net, f"w{i}") for i in range(len(scales)))], lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        net.plain(torch.ones(3, 2)).sum().backward()
        optimizer.step()
        if step == 2:
            for i in range(len(scales)):
                getattr(net, f"w{i}").scale = 1.5
    found = paramwatch.summary(net).frame["std"]
    watch.close()

    assert not watch.recorder.guard.failed
    norms = watch.frame("param_norm")
    assert norms["plain.weight"].notna().all()
    for i, scale in enumerate(scales):
        assert (said[f"w{i}"], watch.parameters.loc[f"w{i}", "dtype"]) == (
            "float32 (unsupported)" if scale is None else "float32",
            "float32",
        )
        expected = [np.nan if scale is None else 2 * scale * 20**0.5, 3 * 20**0.5]
        np.testing.assert_allclose(norms[f"w{i}"].iloc[[0, 3]], expected, rtol=1e-6)
        assert found[f"w{i}"] == 0


QUIET = """
import warnings, torch
from torch import nn
warnings.simplefilter("error")
import paramwatch
for update in ("exact", "sampled"):
    net = nn.Linear(2, 2)
    for n in (3, 5000):
        net.register_parameter(f"c{n}", nn.Parameter(torch.view_as_complex(torch.ones(n, 2).half()), requires_grad=False))
    watch = paramwatch.attach(net, update=update, detail="full", histograms=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    paramwatch.summary(net)
    watch.close()
    print(watch.frame("param_norm")["c3"].round(3).tolist(), watch.frame("update_norm")["c5000"].tolist())
"""


def test_nobody_is_warned_of_what_only_measuring_would_make() -> None:
    shown = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=120, check=False)

    assert (shown.returncode, "ComplexHalf" in shown.stderr, "failed" in shown.stderr) == (0, False, False), shown.stderr
    assert shown.stdout.splitlines() == 2 * ["[2.449, 2.449, 2.449] [0.0, 0.0, 0.0]"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_tensors_of_tensors_are_named_and_have_the_shape_that_they_share(layout: torch.layout, update: Any) -> None:
    net = Odd(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout))
    assert_nothing_known(net, update, "float32 (unsupported)")
    assert paramwatch.attach(net).parameters.loc["odd", "shape"] == (2, -1, 3)
    found = paramwatch.summary(net)
    assert found.frame.loc["odd", "shape"] == (2, -1, 3)
    assert "2x?x3" in str(found)
    assert "nested: cannot be measured" in str(found)


def test_quantised_subclasses_are_measured_by_the_numbers_they_stand_for() -> None:
    # torchao is no dependency
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed", exc_type=ImportError)
    for config in (quantization.Int8WeightOnlyConfig(), quantization.Float8WeightOnlyConfig()):
        for update in UPDATES:
            layer = nn.Sequential(nn.Linear(96, 64, bias=False, dtype=torch.bfloat16))
            quantization.quantize_(layer, config)
            weight = layer[0].weight
            assert type(weight) is not nn.Parameter
            said, line = watched(Odd(weight.requires_grad_(False)), update=update, detail="full")

            assert said == "bfloat16"
            assert_line(line, truth.reals(weight.dequantize()), truth.reals(weight.dequantize()))


# ---- more than 2^31 elements ------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Notes the operations on tensors of so many elements, and the positions that elements are picked at."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.positions: list[Tensor] = []
        self._numel = numel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Tensor) and x.numel() == self._numel for x in args):
            self.seen.append(str(func))
            if func is torch.ops.aten.index.Tensor:
                self.positions += args[1]
        return func(*args, **(kwargs or {}))


def test_more_than_2_to_the_31_elements_are_counted_and_those_of_meta_tensors_never_asked_for() -> None:
    """What counts elements counts in Python integers, int64 and float64, and so does the kernel; none of them is full below 2^53."""
    numel = 2**31 + 7
    net = Odd(torch.empty(numel, dtype=torch.bfloat16, device="meta"))
    with Operations(numel) as operations:
        watched(net, detail="full")
    row = paramwatch.attach(net).parameters.loc["odd"]

    assert (row["numel"], row["bytes"]) == (numel, 2 * numel)
    assert operations.seen == []


@pytest.mark.parametrize("numel", [2**31 + 5, 2**33, 2**40 + 1])
def test_a_sample_of_more_than_2_to_the_31_elements_is_spread_over_all_of_them(numel: int) -> None:
    # one element in memory
    huge = torch.ones(1).expand(numel)
    with Operations(numel) as operations:
        assert measure.sample(huge).shape == (measure.SAMPLE,)
    (at,) = operations.positions

    assert at.dtype is torch.int64
    assert (at.diff() > 0).all()
    assert at[-1] < numel
    assert (at - torch.arange(measure.SAMPLE) * numel // measure.SAMPLE).abs().max() <= numel // measure.SAMPLE + 1
    found = measure.measure_sampled_update([huge], [measure.sample(huge)]).numpy()
    assert found[0, list(PARTS).index("count")] == numel
