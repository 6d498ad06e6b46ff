"""One self-contained HTML document: a frame, our stylesheet and scripts, and data as JSON.

Nothing in it is loaded from anywhere, and its content security policy forbids it: no source but the
scripts and the stylesheet written here, named by their hashes. So text that slipped through an
escape could still not run.
"""

import base64
import hashlib
import html
import json
import re
from functools import cache
from importlib import resources
from typing import Any

from llm.inference import scales
from llm.inference.spelling import escape_character, escaped, pieces

# One letter a way of colouring, the class of its levels and the letter of its scale.
MODES = {
    "p": ("probability", "c"),
    "r": ("rank", "c"),
    "s": ("surprisal", "c"),
    "e": ("entropy", "c"),
    "m": ("effect of sampling", "d"),
    "x": ("change", "d"),
    "q": ("before", "c"),
    "a": ("after", "c"),
}


def document(
    title: str, body: str, *, kind: str, scripts: tuple[str, ...], data: Any, connect: str = "'none'"
) -> str:
    """The whole document.

    Args:
      body: HTML, already escaped.
      kind: what the page shows, for the stylesheet and the scripts: "tokens", "diff", "attention".
      scripts: names of script files beside this one, run in this order after the body.
      data: what the scripts read, as JSON.
      connect: the policy's connect-src; "'self'" for a page that talks to its server.
    """
    style = _asset("page.css") + scales.css_colours() + _mode_rules()
    script = "\n".join(_asset(name) for name in scripts)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        f"img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!doctype html>\n<html lang="en" data-kind="{kind}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{script_json(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Text for an element or a quoted attribute, in one line."""
    return html.escape(escaped(text))


def visible(text: str) -> str:
    """A token's text as HTML that keeps every character and marks the invisible ones."""
    return "".join(_PIECE[kind](part) for kind, part in pieces(text))


_PIECE = {
    "plain": html.escape,
    "space": lambda part: f"<i>{part}</i>",
    "tab": lambda part: f'<i class="tab">{part}</i>',
    "newline": lambda part: f'<i class="nl">{part}</i>',
    "escape": lambda part: f'<i class="esc">{escape_character(part)}</i>',
}


def script_json(data: Any) -> str:
    """JSON that can stand in a script element whatever strings it holds.

    `</script>` and `<!--` would end the element or change how it is parsed, U+2028 ends a line in
    old JavaScript, and a lone surrogate cannot be written as UTF-8: all become escapes.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u007f-\u009f\u2028\u2029\ud800-\udfff]", _json_escape, text)


def _json_escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def choices(name: str, legend: str, options: dict[str, str], chosen: str) -> str:
    """A group of radio buttons; the stylesheet acts on which is checked, without JavaScript."""
    buttons = "".join(
        f'<label><input type="radio" name="{name}" id="{name}-{key}"'
        f"{' checked' if key == chosen else ''}><span>{label}</span></label>"
        for key, label in options.items()
    )
    return f'<fieldset class="choice {name}"><legend>{legend}</legend>{buttons}</fieldset>'


def theme_choice() -> str:
    """Light, dark, or what the system prefers."""
    return choices(
        "theme", "Theme", {"auto": "auto", "light": "light", "dark": "dark"}, chosen="auto"
    )


@cache
def _asset(name: str) -> str:
    return (resources.files("llm.inference") / name).read_text("utf-8")


@cache
def _mode_rules() -> str:
    """For each way of colouring that can be chosen: which level has which colour."""
    rules = []
    for letter, (_, scale) in MODES.items():
        levels = scales.SEQUENTIAL_LEVELS if scale == "c" else scales.DIVERGING_LEVELS
        chosen = f":root:has(#by-{letter}:checked) "
        rules += [
            f"{chosen}.{letter}{level}{{background:var(--{scale}{level});"
            f"color:var(--{scale}k{level})}}"
            for level in range(levels)
        ]
        rules.append(f"{chosen}.key-{letter}{{display:flex}}")
    return "\n".join(rules)


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
