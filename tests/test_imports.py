"""Imports go one way, and what is light stays light; each check has a twin that shows it can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import paramwatch

PACKAGE = Path(paramwatch.__file__).parent

LAYERS = (
    "lightning loggers cli __main__",
    "watch",
    "report digest usedigest tail",
    "standing listing export",
    "series",
    "attached",
    "handover worker outlet batching alike assemble recorder streak opened others uses gradients raw outside updates rounds "
    "numbering plan deviceplan rooms strangers clock inventory sight changes optimizers clipping arguments",
    "tensorboard steps closures progress traced codespan callstack inherited untraced measure run loading overview sampling together "
    "sidebyside matrices answering",
    "notebook frames useframes table initial vouched fitting wording zeros laws lopsided drawn standards hazards branches scale standins "
    "sheet",
    "store files latest contents epoch arrowfile streams histograms uselines agreement format absence block batch cost folder schedule "
    "totals rules ties memory testing shapes lettering png heatmap grid span terminal output usage",
    "rows formulas departures evenness repeats storage",
    "record merging bins",
    "ragged columns guard globs ranks",
)
"""From the top: a module imports from its own layer and from those below; the modules of a folder are in its layer."""

LIGHT = (
    "globs folder files arrowfile latest epoch streams format contents store table frames columns merging bins histograms guard record "
    "absence rules testing schedule totals block notebook run tensorboard.events sheet lettering png heatmap grid span terminal output "
    "usage uselines agreement useframes loading series standing usedigest digest listing tail export cli report"
)
"""What works where torch is not installed."""


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imports_of(source: str) -> set[str]:
    """Modules of the package that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in full if name.removeprefix("paramwatch.") in FILES} or {str(node.module)}
    return {name.removeprefix("paramwatch.") for name in found if name.startswith("paramwatch.")}


def layer_of(module: str) -> int:
    """Position in `LAYERS`, from the bottom."""
    for height, layer in enumerate(reversed(LAYERS)):
        if module.partition(".")[0] in layer.split():
            return height
    raise AssertionError(f"{module} has no place in LAYERS")


def upward(imports: Mapping[str, set[str]]) -> list[str]:
    """The imports that go up."""
    return [f"{module} imports {other}" for module, others in imports.items() for other in others if layer_of(other) > layer_of(module)]


def loaded_by(code: str) -> set[str]:
    """The packages that a fresh interpreter has loaded after running some code."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True, timeout=120
    )
    return {name.partition(".")[0] for name in shown.stdout.split()}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Module -> what it imports of the package; the package itself resolves its names later and is left out."""
    return {name: imports_of(file.read_text(encoding="utf-8")) for name, file in FILES.items() if name}


def test_imports_go_down(imports: dict[str, set[str]]) -> None:
    assert upward(imports) == []


def test_no_imports_go_round(imports: dict[str, set[str]]) -> None:
    assert len(list(TopologicalSorter(imports).static_order())) == len(imports)


def test_an_import_that_goes_up_or_round_would_be_seen() -> None:
    assert upward({"columns": {"watch"}, "watch": {"columns"}}) == ["columns imports watch"]
    assert imports_of("def later():\n    from paramwatch import steps\n    import paramwatch.frames") == {"steps", "frames"}
    assert imports_of("from paramwatch.measure.naive import ORDER\nimport torch") == {"measure.naive"}
    with pytest.raises(CycleError):
        list(TopologicalSorter({"rows": {"ties"}, "ties": {"rows"}}).static_order())
    with pytest.raises(AssertionError, match="no place"):
        layer_of("utils")


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import paramwatch")

    assert "paramwatch" in loaded
    assert not loaded & {"torch", "numpy", "pandas", "pyarrow", "lightning", "pytorch_lightning", "tensorboard"}


def test_what_only_reads_never_loads_torch() -> None:
    loaded = loaded_by("\n".join(f"import paramwatch.{module}" for module in LIGHT.split()) + "\nimport paramwatch\nparamwatch.load")

    assert "pandas" in loaded
    assert not loaded & {"torch", "lightning", "pytorch_lightning"}


def test_the_store_does_not_need_pandas() -> None:
    assert "pandas" not in loaded_by("import paramwatch.store, paramwatch.rules, paramwatch.tensorboard.events")


def test_what_is_loaded_would_be_seen() -> None:
    assert loaded_by("import paramwatch\nparamwatch.attach") >= {"torch", "pandas", "pyarrow"}


def test_every_public_name_is_where_the_package_says() -> None:
    for name in paramwatch.__all__:
        assert getattr(paramwatch, name) is not None
    assert set(paramwatch._HOME) | {"__version__"} == set(paramwatch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'attatch'"):
        _ = paramwatch.attatch
