"""Every parameter and gradient of a PyTorch model, at every optimizer step, ties included.

Public names are resolved on first use, so that `import paramwatch` loads neither torch nor pandas nor pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from paramwatch.guard import ParamWatchError as ParamWatchError
    from paramwatch.loading import load as load
    from paramwatch.overview import summary as summary
    from paramwatch.record import Finding as Finding
    from paramwatch.record import Record as Record
    from paramwatch.record import Sink as Sink
    from paramwatch.record import TieGroup as TieGroup
    from paramwatch.run import Run as Run
    from paramwatch.sheet import Summary as Summary
    from paramwatch.ties import tie_groups as tie_groups
    from paramwatch.watch import Watch as Watch
    from paramwatch.watch import attach as attach

_HOME = {
    "Finding": "record",
    "ParamWatchError": "guard",
    "Record": "record",
    "Run": "run",
    "Sink": "record",
    "Summary": "sheet",
    "TieGroup": "record",
    "Watch": "watch",
    "attach": "watch",
    "load": "loading",
    "summary": "overview",
    "tie_groups": "ties",
}

__all__ = [
    "Finding",
    "ParamWatchError",
    "Record",
    "Run",
    "Sink",
    "Summary",
    "TieGroup",
    "Watch",
    "__version__",
    "attach",
    "load",
    "summary",
    "tie_groups",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
