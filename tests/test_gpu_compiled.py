"""What the Triton kernels compile to, which needs no GPU: wide loads, few registers, and the same order of sums in every kernel."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gpu_trials
import pytest
import torch
from gpu_cases import most

from paramwatch.measure import gpu
from paramwatch.measure.native import TYPES
from paramwatch.measure.tables import Sizes, Variant

triton = pytest.importorskip("triton")

SIZES = Sizes()
ARCHITECTURES = [80, 90]
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16

VARIANTS: dict[str, tuple[str, Variant, dict[str, Any]]] = {
    **{f"measure {dtype}": ("measure_chunks", Variant(dtype, True, False, False, None), {"COPY": False}) for dtype in (FLOAT, BRAIN, HALF)},
    **{f"copy {dtype}": ("measure_chunks", Variant(dtype, True, True, False, None), {"COPY": True}) for dtype in (FLOAT, BRAIN)},
    **{
        f"update {dtype}": ("measure_updates", Variant(dtype, True, True, False, None), {"maxnreg": SIZES.registers})
        for dtype in (FLOAT, BRAIN)
    },
    **{
        f"dot {dtype}": ("measure_updates", Variant(dtype, True, True, True, dtype), {"maxnreg": SIZES.registers})
        for dtype in (FLOAT, BRAIN)
    },
    "copy, misaligned": ("measure_chunks", Variant(BRAIN, True, False, False, None), {"COPY": True}),
    "update, misaligned": ("measure_updates", Variant(BRAIN, True, False, False, None), {"maxnreg": SIZES.registers}),
    "dot, misaligned": ("measure_updates", Variant(FLOAT, True, True, False, BRAIN), {"maxnreg": SIZES.registers}),
}
"""What a launch is compiled for: the kernel, dtypes and alignments, and what else the launcher gives."""

HISTOGRAMS: dict[str, tuple[str, Variant, dict[str, Any]]] = {
    **{f"{dtype}": ("count_chunks", Variant(dtype, True, False, False, None), {"UPDATE": False, "SCALED": False}) for dtype in TYPES},
    "update": ("count_chunks", Variant(FLOAT, True, True, False, None), {"UPDATE": True, "SCALED": False}),
    "scaled": ("count_chunks", Variant(FLOAT, True, False, False, None), {"UPDATE": False, "SCALED": True}),
}
"""The same of histograms."""

LOADS = {"measure": 4, "copy": 4, "update": 4, "dot": 6}
"""Of 16 bytes, in the loop over whole tiles."""

FEW_COMPILED = ["measure torch.float32", "update torch.float32"]
"""Of every suite: compiling takes some seconds each."""

POINTERS = {"p_plan": "*i64", "p_address": "*i64", "p_record": "*fp64", "p_count": "*i64", "p_scale": "*fp32", "p_out": "*fp64"}

Compiled = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles a variant for an architecture, each once."""
    source = triton.compiler.ASTSource
    if "constexprs" not in inspect.signature(source).parameters:
        pytest.skip(f"the compiler of Triton {triton.__version__} is called in another way")
    known: dict[tuple[str, int], Any] = {}

    def compile(name: str, architecture: int) -> Any:
        if (name, architecture) not in known:
            if name.startswith("fold"):
                kernel = gpu.kernels().fold
                lanes, warps = (32, 1) if name == "fold few" else (SIZES.many_lanes, SIZES.many_warps)
                chosen = {"SCALED": 1, "LANES": lanes, "num_warps": warps, "enable_fp_fusion": False}
            else:
                which, variant, extra = (VARIANTS | HISTOGRAMS)[name]
                kernel = getattr(gpu.kernels(), which)
                chosen = gpu.options(variant, kernel, SIZES, extra)
            names = kernel.arg_names
            signature = {arg: POINTERS.get(arg, "i32") if arg.islower() else "constexpr" for arg in names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if arg in POINTERS}
            constants = {arg: chosen.pop(arg) for arg in names if arg in chosen}
            known[name, architecture] = triton.compile(
                source(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
                target=triton.backends.compiler.GPUTarget("cuda", architecture, 32),
                options=chosen,
            )
        return known[name, architecture]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield compile


def disassembled(kernel: Any, folder: Path) -> tuple[int, list[str]]:
    """Registers of a thread, and the instructions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"Triton {triton.__version__} comes without cuobjdump")
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])

    def said(option: str) -> str:
        return subprocess.run([tool, option, binary], capture_output=True, text=True, check=True, timeout=60).stdout

    registers = re.search(r"REG:(\d+)", said("--dump-resource-usage"))
    assert registers is not None
    return int(registers[1]), re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", said("--dump-sass"), re.MULTILINE)


def hot_loop(kernel: Any) -> str:
    """Of the PTX, the loop with the most loads of 16 bytes: from its label to the jump back."""
    loops = []
    ptx = kernel.asm["ptx"]
    for label in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE):
        jumps = [jump for jump in re.finditer(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", ptx) if jump.start() > label.start()]
        if jumps:
            loops.append(ptx[label.start() : jumps[-1].start()])
    return max(loops, key=lambda loop: len(re.findall(WIDE, loop)))


WIDE = r"ld\.global\S*\.(?:v4\.b32|v2\.b64)"
NARROW = r"ld\.global(?!\S*\.(?:v4\.b32|v2\.b64))"

main = [name for name in VARIANTS if "misaligned" not in name]


@pytest.mark.parametrize("architecture", most(ARCHITECTURES, [90]))
@pytest.mark.parametrize("name", most(main, FEW_COMPILED))
def test_the_loop_over_whole_tiles_loads_16_bytes_at_a_time(compiled: Compiled, name: str, architecture: int) -> None:
    loop = hot_loop(compiled(name, architecture))

    assert len(re.findall(WIDE, loop)) == LOADS[name.split()[0]]
    assert re.findall(NARROW, loop) == []
    assert len(re.findall(r"st\.global\S*\.v4\.b32", loop)) == (4 if name.startswith("copy") else 0)


@pytest.mark.parametrize("architecture", most(ARCHITECTURES, [90]))
@pytest.mark.parametrize("name", most(main, FEW_COMPILED))
def test_the_registers_of_three_blocks_fit_and_none_is_spilled(compiled: Compiled, name: str, architecture: int, tmp_path: Path) -> None:
    registers, instructions = disassembled(compiled(name, architecture), tmp_path)
    spilled = [at for at, instruction in enumerate(instructions) if re.match(r"(@!?\w+ )?(STL|LDL)", instruction)]

    assert registers <= 80
    if not name.startswith("dot"):
        assert spilled == []
    # with a gradient a few values that are used once may be, but none where it costs: among the wide loads
    wide = [at for at, instruction in enumerate(instructions) if "LDG.E.128" in instruction]
    assert len(wide) == LOADS[name.split()[0]]
    assert not [at for at in spilled if wide[0] <= at <= wide[-1]]


@pytest.mark.parametrize("architecture", most(ARCHITECTURES, [90]))
@pytest.mark.parametrize("name", most(["fold few", "fold many"], ["fold few"]))
def test_folding_compiles_and_spills_nothing(compiled: Compiled, name: str, architecture: int, tmp_path: Path) -> None:
    registers, instructions = disassembled(compiled(name, architecture), tmp_path)

    assert registers * 32 * (1 if name == "fold few" else SIZES.many_warps) <= 65536
    assert not [instruction for instruction in instructions if re.match(r"(@!?\w+ )?(STL|LDL)", instruction)]


@pytest.mark.parametrize("name", most(main, FEW_COMPILED))
def test_subnormal_numbers_are_not_flushed(compiled: Compiled, name: str) -> None:
    assert ".ftz" not in compiled(name, 90).asm["ptx"]


@pytest.mark.parametrize("architecture", most(ARCHITECTURES, [90]))
@pytest.mark.parametrize("name", most(HISTOGRAMS, ["torch.bfloat16"]))
def test_histograms_compile_and_spill_nothing(compiled: Compiled, name: str, architecture: int, tmp_path: Path) -> None:
    registers, instructions = disassembled(compiled(name, architecture), tmp_path)

    assert registers <= 128
    assert not [instruction for instruction in instructions if re.match(r"(@!?\w+ )?(STL|LDL)", instruction)]
    # nothing is added up in floating point by several programs
    assert not [instruction for instruction in instructions if re.match(r"(@!?\w+ )?(RED|ATOMG?)\b.*\.F", instruction)]
    if name in ("torch.float32", "torch.bfloat16"):
        wide = {"torch.float32": 128, "torch.bfloat16": 64}[name]
        assert [instruction for instruction in instructions if f"LDG.E.{wide}" in instruction]


def sums(kernel: Any) -> dict[str, str]:
    """How the operands of reductions are dealt to threads, by their type: it sets the order of the sums."""
    text = kernel.asm["ttgir"]
    dealt = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    return {shape: dealt[name] for shape, name in re.findall(r"\}\) : \(tensor<(\w+), (#\w+)>\)", text)}


@pytest.mark.parametrize("name", most([name for name in VARIANTS if not name.startswith("measure")], FEW_COMPILED))
def test_sums_are_in_the_same_order_whatever_else_a_kernel_does(compiled: Compiled, name: str) -> None:
    dtype = VARIANTS[name][1].dtype
    plain, other = sums(compiled(f"measure {dtype}", 90)), sums(compiled(name, 90))

    assert f"{SIZES.lanes}xf32" in plain
    assert other == plain
    assert compiled(name, 90).metadata.enable_fp_fusion is False


@pytest.mark.thorough
def test_a_launch_is_understood_and_sizes_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(gpu_trials.compiled_by_launches).result()

    assert found == [(1, 0, 1), (1, 0, 1), (1, 0, 1), (1, 1, 2), (1, 1, 2), (1, 1, 2)]
