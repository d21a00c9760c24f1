"""Names as text, and glob patterns over them, as `include`, `exclude` and `parameters` take them.

Names are data: any text is one, and a pattern that is a name fits it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence


def fitting(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name is one of the patterns, or fits one as a case-sensitive glob."""
    exact = frozenset(patterns)
    if "*" in exact:
        return lambda name: True
    globs = [re.compile(fnmatch.translate(pattern)).match for pattern in patterns]
    return lambda name: name in exact or any(fits(name) for fits in globs)


def text(given: str) -> str:
    """The same, with what no Unicode text can hold (half a surrogate pair) written out."""
    return given if given.isascii() else given.encode("utf-8", "backslashreplace").decode()
