"""The kernel for the CPU at hand: compiled on first use into the user's cache, where a C++ compiler is there.

A shared library runs with the user's rights, so it is only ever loaded from a folder that nobody else can write. Several processes may
compile at once: each into a file of its own, which takes the name in one step.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from paramwatch.guard import logger

SOURCE = Path(__file__).with_name("kernel.cc")
_UNITS = (SOURCE, *(SOURCE.with_name(f"{name}.cc") for name in ("histogram", "products", "structure")))
_SOURCES = (*_UNITS, *(SOURCE.with_name(f"{name}.h") for name in ("elements", "lanes", "sums", "threads")))

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno")
"""Followed by those of `$PARAMWATCH_CXXFLAGS`, for sanitizers."""

_FOR_THIS_CPU = ("-march=native", "-mcpu=native")
"""What compilers call it; the first that is understood is taken, on some none is."""

_PATIENCE = 120.0
"""Seconds that compiling may take; it takes about two."""


class NoKernel(Exception):  # noqa: N818
    """Why there is no kernel; the text is for users."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with one line in the log that says how to get it, where that cannot be."""
    try:
        return ctypes.CDLL(str(_compiled()))
    except (NoKernel, OSError, subprocess.SubprocessError) as error:
        logger.info("paramwatch: measuring on the CPU in plain PyTorch, which takes several times longer: %s", error)
        return None


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$PARAMWATCH_CACHE`, else where this system keeps a user's caches."""
    if chosen := os.environ.get("PARAMWATCH_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "paramwatch"
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "paramwatch"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        # as in a container that is run as a number nobody knows
        raise NoKernel("this user has no home folder to keep it in; name a folder in PARAMWATCH_CACHE") from error


def _compiled() -> Path:
    compiler = _compiler()
    folder = _private(cache_folder())
    ready = folder / f"kernel-{_key(compiler)}.so"
    if not ready.exists():
        logger.info("paramwatch: compiling the measuring kernel for this CPU, once, into %s", folder)
        _compile(compiler, ready)
    return ready


def _compiler() -> list[str]:
    """The command, which may be of several words: `ccache g++`."""
    if sys.platform == "win32":
        raise NoKernel("there is no kernel for Windows yet")
    if os.environ.get("PARAMWATCH_KERNEL") == "off":
        raise NoKernel("PARAMWATCH_KERNEL=off")
    commands = (os.environ.get("CXX", "").split(), ["c++"], ["g++"], ["clang++"])
    found = next(([path, *command[1:]] for command in commands if command and (path := shutil.which(command[0]))), None)
    if found is None:
        raise NoKernel("no C++ compiler was found; install g++ or clang++, or name one in CXX")
    return found


def _flags() -> tuple[str, ...]:
    return (*FLAGS, *os.environ.get("PARAMWATCH_CXXFLAGS", "").split())


def _key(compiler: Sequence[str]) -> str:
    """Of everything the library depends on: source, flags, compiler and CPU."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=_PATIENCE).stdout
    said = hashlib.sha256()
    sources = [source.read_bytes() for source in _SOURCES]
    for fact in (*sources, repr(_flags()).encode(), repr(compiler).encode(), version, platform.machine().encode(), _cpu()):
        said.update(len(fact).to_bytes(8, "little") + fact)
    return said.hexdigest()[:20]


def _cpu() -> bytes:
    """What tells apart CPUs whose instructions differ; a home folder may be shared by several machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        told = (b"model name", b"flags", b"features", b"cpu part")
        return b"\n".join(sorted({line for line in lines if line.lower().startswith(told)}))
    return platform.processor().encode()


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # whoever owns a link may let it lead elsewhere once this was looked at
    folder = folder.resolve()
    seen = folder.stat()
    if seen.st_uid != os.getuid() or seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoKernel(f"others can write {folder}; make it yours alone (chmod 700), or name another folder in PARAMWATCH_CACHE")
    return folder


def _compile(compiler: Sequence[str], ready: Path) -> None:
    handle, made = tempfile.mkstemp(dir=ready.parent, suffix=".so")
    os.close(handle)
    try:
        said = ""
        for cpu in (*([flag] for flag in _FOR_THIS_CPU), ()):
            done = _run([*compiler, *_flags(), *cpu, *map(str, _UNITS), "-o", made])
            if done.returncode == 0:
                os.replace(made, ready)
                return
            said = done.stderr
        raise NoKernel(f"{' '.join(compiler)} could not compile the kernel: {said.strip()[:500]}")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False)
