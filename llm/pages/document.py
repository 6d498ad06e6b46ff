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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from llm.pages import scales
from llm.pages.spelling import escaped

# Each way of colouring: the letter of its levels' classes, and of its scale.
MODES = {
    "p": "c",  # probability
    "r": "c",  # rank
    "s": "c",  # surprisal
    "e": "c",  # entropy
    "m": "d",  # effect of sampling
    "x": "d",  # change from one checkpoint to another
    "q": "c",  # probability before
    "a": "c",  # probability after
    "w": "c",  # attention weight
}


def document(
    title: str,
    body: str,
    *,
    kind: str,
    choices: Sequence["Choice"],
    scripts: Sequence[str],
    data: Any,
    connect: str = "'none'",
) -> str:
    """The whole document.

    Args:
      body: HTML, already escaped.
      kind: what the page shows, for the stylesheet and the scripts: "tokens", "diff", "attention".
      choices: whose labels the body holds, in an element of the class "bar".
      scripts: names of script files beside this one, run in this order after the body.
      data: what the scripts read, as JSON.
      connect: the policy's connect-src; "'self'" for a page that talks to its server.
    """
    style = _asset("page.css") + scales.css_colours() + _mode_rules() + _choice_rules(choices)
    inputs = "".join(choice.inputs() for choice in choices)
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
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f'<body>\n{inputs}\n<div class="page">\n{body}\n</div>\n'
        f'<script type="application/json" id="data">{script_json(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Text for an element or a quoted attribute, in one line."""
    return html.escape(escaped(text))


def plain_text(text: str) -> str:
    """Text for an element of the class "plain": lines stay lines, unsafe characters are escaped."""
    return html.escape(escaped(text, keep="\n\t"))


def script_json(data: Any) -> str:
    """JSON that can stand in a script element whatever strings it holds.

    `</script>` and `<!--` would end the element or change how it is parsed, U+2028 ends a line in
    old JavaScript, and a lone surrogate cannot be written as UTF-8: all become escapes.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u007f-\u009f\u2028\u2029\ud800-\udfff]", _json_escape, text)


def _json_escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


@dataclass(frozen=True)
class Choice:
    """A group of radio buttons that the stylesheet acts on.

    The buttons stand before everything else in the body, so that a rule can reach from a checked
    one to the text (`#by-p:checked ~ .page`). `:root:has()` could reach as far, but would make the
    browser look at ten thousand tokens again whenever anything on the page changes.
    """

    name: str
    legend: str
    options: Mapping[str, str]

    def inputs(self) -> str:
        first = next(iter(self.options))
        return "".join(
            f'<input class="unseen" type="radio" name="{self.name}" id="{self.name}-{key}" '
            f'aria-label="{self.legend}: {label}"{" checked" if key == first else ""}>'
            for key, label in self.options.items()
        )

    def labels(self) -> str:
        labels = "".join(
            f'<label for="{self.name}-{key}">{label}</label>' for key, label in self.options.items()
        )
        return f'<div class="choice {self.name}"><span>{self.legend}</span>{labels}</div>'


THEME = Choice("theme", "Theme", {"auto": "auto", "light": "light", "dark": "dark"})


@cache
def _asset(name: str) -> str:
    return (resources.files("llm.pages") / name).read_text("utf-8")


@cache
def _mode_rules() -> str:
    """Which level has which colour, where its way of colouring is the chosen or the only one."""
    rules = []
    for letter, scale in MODES.items():
        levels = scales.SEQUENTIAL_LEVELS if scale == "c" else scales.DIVERGING_LEVELS
        chosen = "" if letter == "w" else f"#by-{letter}:checked~.page"
        rules += [
            f"{chosen} .{letter}{level}{{background:var(--{scale}{level});"
            f"color:var(--{scale}k{level})}}"
            for level in range(levels)
        ]
        rules.append(f"{chosen} .{letter}-{{color:var(--faint)}}")
        rules.append(f"{chosen} .key-{letter}{{display:flex}}")
    return "\n".join(rules)


def _choice_rules(choices: Sequence[Choice]) -> str:
    """The look of the chosen and of the focused label."""
    ids = [f"{choice.name}-{key}" for choice in choices for key in choice.options]
    checked = ",".join(f"#{id_}:checked~.page [for={id_}]" for id_ in ids)
    focused = ",".join(f"#{id_}:focus-visible~.page [for={id_}]" for id_ in ids)
    return (
        f"{checked}{{background:var(--ink);border-color:var(--ink);color:var(--paper)}}"
        f"{focused}{{outline:2px solid var(--first);outline-offset:2px}}"
    )


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
