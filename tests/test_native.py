"""The compiled kernel against the specification, and how it comes to be compiled."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paramwatch
from paramwatch.columns import PARTS
from paramwatch.measure import compiler, native
from paramwatch.measure.naive import ORDER, as_reals, parts

NAN, INF = float("nan"), float("inf")
EXACT = [i for i, part in enumerate(ORDER) if PARTS[part].integer or part in ("min", "max")]
CHUNK, BLOCK, PAST_THE_CACHE = 1 << 16, 1024, 1 << 22
LENGTHS = [0, 1, 2, 3, 15, 16, 17, 31, 33, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler: there is no kernel to test")


def noise(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def repr_of(x: Tensor) -> str:
    return f"{x.dtype}{list(x.shape)}"


def assert_right(found: np.ndarray, x: Tensor, dot: Tensor | None = None) -> None:
    """Counts and extremes to the bit, the rest to 1e-10 of what was summed."""
    reals = as_reals(x)
    expected = parts(reals, None if dot is None else as_reals(dot)).numpy()
    np.testing.assert_array_equal(found[EXACT], expected[EXACT])
    finite = reals[torch.isfinite(reals)]
    size = float(finite.abs().mean()) if len(finite) else 0.0
    np.testing.assert_allclose(found[:-1], expected[:-1], rtol=1e-10, atol=1e-10 * size)
    if dot is not None:
        products = (reals * as_reals(dot))[torch.isfinite(reals) & torch.isfinite(as_reals(dot))]
        assert found[-1] == pytest.approx(expected[-1], abs=1e-10 * float(products.abs().sum()))


# ---- what it measures -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length_is_measured_as_specified(n: int, dtype: torch.dtype) -> None:
    x = noise(n, dtype)
    assert_right(native.parts_of([x])[0], x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [NAN, INF, -INF, 0.0, -0.0])
def test_what_is_not_finite_is_counted_wherever_it_is(special: float, dtype: torch.dtype) -> None:
    tensors = []
    for at in (0, 1, 14, 15, 16, BLOCK - 1, BLOCK, 2 * BLOCK + 3, -1):
        x = noise(2 * BLOCK + 7, dtype)
        x[at] = special
        tensors.append(x)
    for x, found in zip(tensors, native.parts_of(tensors), strict=True):
        assert_right(found, x)
        assert found[ORDER.index("nan" if special != special else "posinf" if special > 1 else "neginf" if special < -1 else "zero")] == 1


@pytest.mark.parametrize(
    "x",
    [
        torch.full((100,), NAN),
        torch.full((3,), -INF),
        torch.zeros(3000),
        torch.full((7777,), 0.1),
        1 + 1e-4 * noise(30_000),
        noise(3000) * 1e30,
        noise(500) * 1e-40,
        noise(3000) * 1e-25,
        noise(3000, torch.float64) * 1e200,
        torch.full((70_000,), 1e200, dtype=torch.float64),
        torch.full((9,), 1e-310, dtype=torch.float64),
        noise(100_000, torch.float64) + 1e6,
        torch.cat([torch.tensor([100.0]), noise(20_000) * 1e-3]),
        torch.cat([torch.full((BLOCK,), NAN), noise(5)]),
        torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16),
        torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16),
        noise(900).view(30, 30).t(),
        noise(900).view(3, 4, 5, 15).to(memory_format=torch.channels_last),
        nn.Parameter(noise(10)),
    ],
    ids=repr_of,
)
def test_extreme_numbers_are_measured_as_specified(x: Tensor) -> None:
    assert native.takes(x)
    assert_right(native.parts_of([x])[0], x)


@pytest.fixture
def flushed() -> Iterator[None]:
    """The CPU takes subnormal numbers for zeros, as some ask torch for."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushed")
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2e-6), (torch.bfloat16, 1e-39), (torch.float32, 1e-40)], ids=str)
def test_where_subnormal_numbers_are_zeros_only_those_are_that_the_specification_takes_for_some(dtype: torch.dtype, size: float) -> None:
    torch.set_flush_denormal(False)
    x = (noise(BLOCK + 7) * size).to(dtype)
    torch.set_flush_denormal(True)

    assert_right(native.parts_of([x])[0], x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_tensor_lies_changes_no_bit(dtype: torch.dtype) -> None:
    x = noise(5000, dtype)
    places = [torch.cat([noise(before, dtype), x])[before:] for before in range(17)]

    found = native.parts_of([*places, x])
    np.testing.assert_array_equal(found, np.repeat(found[-1:], 18, axis=0))


def test_the_same_bits_for_any_number_of_threads_and_neighbours() -> None:
    tensors = [noise(700_001), noise(5), noise(CHUNK, torch.bfloat16), noise(300_000, torch.float64)]
    old = [x * 0.99 for x in tensors]
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            runs.append([native.parts_of(tensors), *native.update_parts(tensors, old, tensors)])
    finally:
        torch.set_num_threads(threads)
    alone = np.concatenate([native.parts_of([x]) for x in tensors])

    for run in runs:
        for found, expected in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(run[0], alone)
        np.testing.assert_array_equal(run[2], alone)


# ---- the update -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 17, BLOCK + 1, CHUNK + 1])
def test_an_update_is_the_float64_difference_and_its_product_with_the_gradient(n: int, dtype: torch.dtype) -> None:
    before, after, grad = noise(n, dtype), noise(n, dtype, seed=1), noise(n, torch.float16, seed=2)
    if n > 3:
        before[2], after[2], after[3], grad[1] = INF, INF, NAN, -INF
    (moved,), (itself,) = native.update_parts([after], [before], [grad])

    assert_right(moved, as_reals(after) - as_reals(before), grad)
    assert_right(itself, after)
    assert np.isnan(native.update_parts([after], [before])[0][0, -1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_are_made_while_reading_bit_for_bit(dtype: torch.dtype) -> None:
    x = noise(CHUNK + 77, dtype)
    x[5] = NAN
    copy = torch.full_like(x, 7.0)
    beyond = torch.full((CHUNK + 177,), 7.0, dtype=dtype)
    native.parts_of([x, x], [copy, beyond[: len(x)]])

    bits = torch.int64 if dtype.itemsize == 8 else torch.int32 if dtype.itemsize == 4 else torch.int16
    assert torch.equal(copy.view(bits), x.view(bits))
    assert (beyond[len(x) :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_copies_past_the_caches_are_made_bit_for_bit(dtype: torch.dtype, shift: int) -> None:
    n = PAST_THE_CACHE + 77
    x, beyond = torch.arange(n, dtype=torch.float32).to(dtype), torch.full((n + 9,), -7.0, dtype=dtype)
    native.parts_of([x], [beyond[shift:][:n]])

    assert torch.equal(beyond[shift:][:n], x)
    assert (beyond[:shift] == -7).all()
    assert (beyond[shift + n :] == -7).all()


@pytest.mark.parametrize(
    "x",
    [
        noise(20).view(4, 5)[:, 1:],
        noise(5).expand(3, 5),
        torch.arange(5),
        torch.complex(noise(4), noise(4)),
        torch.complex(noise(4), noise(4)).conj().imag,
        torch.sparse_coo_tensor([[1]], [2.0], (3,), check_invariants=True),
        torch.empty(3, device="meta"),
    ],
    ids=repr_of,
)
def test_what_is_not_plain_or_in_one_piece_is_left_to_others(x: Tensor) -> None:
    assert not native.takes(x)


# ---- how it is compiled ---------------------------------------------------------------------

COMPILE = "from paramwatch.measure import native; print(native.available())"


@pytest.fixture
def no_library(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """This process looks for its library as if for the first time."""
    caplog.set_level(logging.INFO)
    compiler.library.cache_clear()
    yield
    compiler.library.cache_clear()


@pytest.fixture
def folder(no_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it looks for it: there is none yet."""
    monkeypatch.setenv("PARAMWATCH_CACHE", str(tmp_path / "cache"))
    # it is not run
    monkeypatch.setenv("PARAMWATCH_CXXFLAGS", "-O0")
    return tmp_path / "cache"


def test_it_is_compiled_once_also_by_several_processes_at_the_same_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    several = [subprocess.Popen([sys.executable, "-c", COMPILE], stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in several] == [b"True", b"True"]
    assert [file.suffix for file in folder.iterdir()] == [".so"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert native.available()
    assert "compiling" not in caplog.text


def test_a_folder_that_others_can_write_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(0o777)

    assert not native.available()
    assert f"others can write {folder}" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_link_is_followed_once(folder: Path) -> None:
    real = folder.with_name("real")
    real.mkdir(0o700)
    folder.symlink_to(real)

    library = compiler.library()
    assert library is not None
    assert Path(library._name).parent == real


REASONS = {
    "no compiler": ({"PATH": "/nonexistent", "CXX": ""}, "no C++ compiler was found; install"),
    "a broken one": ({"CXX": "false"}, "false"),
    "it cannot compile": ({"PARAMWATCH_CXXFLAGS": "-no-such-flag"}, "could not compile the kernel"),
    "switched off": ({"PARAMWATCH_KERNEL": "off"}, "PARAMWATCH_KERNEL=off"),
    "the folder cannot be made": ({"PARAMWATCH_CACHE": "/dev/null/cache"}, "/dev/null/cache"),
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("environment", "reason"), REASONS.values(), ids=REASONS)
def test_without_a_kernel_one_line_says_why(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert not native.available()
    (said,) = (line for line in caplog.messages if "plain PyTorch" in line)
    assert reason in said


@pytest.mark.usefixtures("no_library")
def test_a_user_without_a_home_has_no_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As in a container that is run as a number nobody knows."""
    for name in ("HOME", "XDG_CACHE_HOME", "PARAMWATCH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)

    assert not native.available()
    assert "name a folder in PARAMWATCH_CACHE" in caplog.text


def test_what_follows_the_compiler_in_cxx_is_given_to_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env c++ -Wall")
    assert native.available()
    assert [file.suffix for file in folder.iterdir()] == [".so"]


@pytest.mark.usefixtures("no_library")
def test_training_is_recorded_without_a_kernel_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    frames = []
    for switch in ("off", "on"):
        monkeypatch.setenv("PARAMWATCH_KERNEL", switch)
        compiler.library.cache_clear()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 1))
        optimizer = torch.optim.Adam(net.parameters())
        with paramwatch.attach(net, update="exact") as watch:
            for _ in range(3):
                net(torch.randn(4, 300)).square().mean().backward()
                optimizer.step()
        frames.append(watch.frame().drop(columns="grad_state").astype(float))

    np.testing.assert_allclose(frames[0], frames[1], rtol=1e-6)
    assert "PARAMWATCH_KERNEL=off" in caplog.text
