"""The page around the figures: one HTML file with nothing beside it.

It has no script, and its policy lets a browser load nothing and run nothing, whatever a name in it may try.
"""

from __future__ import annotations

from collections.abc import Iterable

from paramwatch.grid import escaped

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

_LIGHT = ("#1f6fb4", "#c9520c", "#2a8a3c", "#b3261e", "#7a4fb5", "#86572c", "#c2409d", "#5a5a5a")
_DARK = ("#6cb2f0", "#ff9a57", "#6fd087", "#ff7b72", "#bb9af2", "#cfa27a", "#f08fd3", "#b8b8b8")

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c1e21;--soft:#5d646d;--rule:#e3e6ea;--edge:#9aa2ac;--nothing:#f0f1f3;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--page:#15181c;--ink:#e6e8ea;--soft:#a0a8b2;--rule:#2b3138;--edge:#6b747f;--nothing:#3a4149;--bad:#ff7b72}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 20px 60px;max-width:1040px;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 8px}
h1,h2,figcaption,caption,p,tbody th{overflow-wrap:anywhere}td,thead th{overflow-wrap:break-word}.trend{white-space:nowrap}
p{margin:4px 0}.note,.path{color:var(--soft);font-size:13px}
figure{margin:16px 0 28px}figcaption{font-weight:600;margin-bottom:6px}
.wide{overflow-x:auto}svg{display:block;width:100%;min-width:640px;height:auto;font:11px system-ui,sans-serif}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:0 24px}.pair svg{min-width:0}
image{image-rendering:pixelated}
text{fill:var(--soft)}.name{text-anchor:end}.step{text-anchor:middle}.axis{text-anchor:end}
.rule{stroke:var(--rule);fill:none}.tick{stroke:var(--edge);fill:none}.bound{stroke:var(--page);fill:none;stroke-width:1.5}
.nothing{fill:var(--nothing);background:var(--nothing)}.tip{fill:transparent}.tip:hover{stroke:var(--ink);stroke-width:1}
.line{fill:none;stroke:currentColor;stroke-width:1.6;stroke-linejoin:round}circle{fill:currentColor}.spoilt{stroke:var(--bad);stroke-width:1.6}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;align-items:center;font-size:13px;color:var(--soft)}
.legend .bar{width:280px;min-width:280px}
.key{display:inline-flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.swatch{display:inline-block;flex:none;width:14px;height:10px;background:currentColor;border:1px solid var(--edge)}
.swatch.nothing{background:var(--nothing)}
table{border-collapse:collapse;font-size:13px;margin:6px 0}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:3px 14px 3px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule);font-weight:400;min-width:4em}
thead th{font-weight:600;color:var(--soft)}.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tbody th{max-width:32em;min-width:9em}
details{margin-top:6px}summary{cursor:pointer;color:var(--soft);font-size:13px}
"""


def page(title: str, path: str, parts: Iterable[str]) -> str:
    """A whole document.

    Args:
        title: Any text.
        path: Where the run is, any text.
        parts: HTML.
    """
    dark = "".join(f".c{i}{{color:{colour}}}" for i, colour in enumerate(_DARK))
    colours = "".join(f".c{i}{{color:{colour}}}" for i, colour in enumerate(_LIGHT)) + f"@media(prefers-color-scheme:dark){{{dark}}}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escaped(title, 200)}</title><style>{_STYLE}{colours}</style></head><body><main>"
        f'<h1>{escaped(title, 200)}</h1><p class="path">{escaped(path, 500)}</p>\n' + "\n".join(parts) + "\n</main></body></html>\n"
    )


def part(title: str, body: str) -> str:
    """A part of a page under a heading; nothing where there is no body."""
    return f"<section><h2>{escaped(title)}</h2>{body}</section>" if body else ""
