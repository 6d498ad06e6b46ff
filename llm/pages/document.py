"""One self-contained HTML document: page.html filled with a body, our stylesheet and scripts, and
data as JSON.

A page loads nothing, and its content security policy forbids loading: the only sources that it
allows are the scripts and the stylesheet written here, named by their hashes. So text that slipped
through an escape could still not run.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from llm.console import escaped
from llm.pages import scales


def document(
    title: str,
    body: str,
    *,
    kind: str,
    scripts: Sequence[str] = (),
    data: Any = None,
    connect: str = "'none'",
    styles: Sequence[str] = ("page.css",),
    **parts: object,
) -> str:
    """The whole document.

    Args:
      title: its heading, as plain text.
      body: name of the template of the body, a file beside this one.
      kind: what the page shows, for the stylesheet and the scripts: "tokens", "diff", "attention".
      scripts: names of script files beside this one, run in this order after the body.
      data: what the scripts read, as JSON.
      connect: the policy's connect-src; "'self'" for a page that talks to its server.
      styles: names of stylesheets beside this one.
      parts: what the template of the body asks for, as HTML that is already escaped.
    """
    style, heading = "\n".join(map(_asset, styles)) + scales.css_colours(), escape(title)
    script = "\n".join(_asset(name) for name in scripts)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        f"img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    content = Template(_asset(body)).substitute(
        parts, title=heading, glossary=_asset("glossary.html")
    )
    return Template(_asset("page.html")).substitute(
        kind=kind,
        policy=policy,
        title=heading,
        style=style,
        body=content,
        data=script_json(data),
        script=script,
    )


_FRAME_PIXELS = 560


def framed(document: str) -> str:
    """A document as a frame that stands in another page.

    The frame is sandboxed: its style and script end at the frame, it has no access to the page
    around it, and nothing of that page reaches into it.
    """
    # A frame's links are relative to the page around it, even `#token`. The <base> has to come
    # before the document's policy, which forbids it.
    based = document.replace("<head>", '<head><base href="about:srcdoc">', 1)
    # ASCII survives a notebook that is read in another encoding than it was written in. Without it,
    # the script's hash would no longer match.
    escaped = html.escape(based).encode("ascii", "xmlcharrefreplace").decode()
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{escaped}" width="100%" '
        f'height="{_FRAME_PIXELS}" style="border:0;resize:vertical;overflow:auto" '
        'title="Token probabilities"></iframe>'
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
    unsafe = "[<>&\u007f-\u009f\u2028\u2029\ud800-\udfff]"
    return re.sub(unsafe, lambda match: f"\\u{ord(match[0]):04x}", text)


@cache
def _asset(name: str) -> str:
    return (resources.files("llm.pages") / name).read_text("utf-8")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
