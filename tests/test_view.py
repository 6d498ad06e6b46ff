"""The page and the coloured terminal text: whole, in order, harmless, in colours that can be read.

The text of a page is read back with the standard library's HTML parser; characters that must not be
shown as they are, are compared with Python's own unicode_escape.
"""

import base64
import gzip
import hashlib
import json
import math
import os
import re
import unicodedata
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from example_records import CHINESE, EMOJI, given, sampled, scored
from hypothesis import example, settings
from hypothesis import given as for_all
from hypothesis import strategies as st
from runs import ROOT

from llm.errors import UsageError
from llm.files import write_output
from llm.pages import scales
from llm.pages.attention_view import attention_page
from llm.pages.paint import paint_stream
from llm.pages.view import diff_page, page

NASTY = [
    b"</script><script>alert(1)</script>",
    b"<!--",
    b"]]>&lt;&amp;",
    b'" onmouseover="alert(2)',
    b"{{7*7}}${7*7}",
    "\u2028\u2029\u0085".encode(),
    b"\x00\x01\x1b[31m\x07\x7f",
    "\u202eevil\u202c \ufeff\u200b\u00ad".encode(),
    "\U000e0041\ufffe".encode(),
    b"\t\r\n  \n",
    b"\\x41 \\u0041",
]
SPLIT = [
    b"a",
    b"\xe4",
    b"\xb8\x96",
    b" \xe7",
    b"\x95\x8c!",
    "👩‍🔬".encode(),
    b"\xf0\x9f",
    b"\x8c\x8d",
]


class Parsed(HTMLParser):
    """What a page says without its scripts."""

    def __init__(self, source: str):
        super().__init__()
        self.stack: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = self.title = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "br"):
            self.stack.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
        if tag == "style":
            self.styles.append("")

    def handle_endtag(self, tag):
        opened, _ = self.stack.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data):
        tag = self.stack[-1][0] if self.stack else ""
        if tag == "script":
            self.scripts[-1] += data
        elif tag == "style":
            self.styles[-1] += data
        elif tag == "title":
            self.title += data
        elif self.stack and self.stack[-1][1].get("class") == "plain":
            self.text += data

    def data(self):
        return json.loads(self.scripts[0])

    def records(self):
        """The records that the page carries, which page.js reads in the same way."""
        return json.loads(gzip.decompress(base64.b64decode(self.data()["records"])))


def spelled(text: str) -> str:
    """A text with whatever is invisible or dangerous as Python would spell it."""
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t\u200c\u200d"
        else c
        for c in text
    )


def paint_tokens(records, environ) -> str:
    """The whole of what `paint_stream` gives piece by piece."""
    return "".join(paint_stream(records, environ))


def joined_text(records) -> str:
    return "".join(record["text"] for record in records if record["type"] == "token")


def tokens_of(records):
    return [record for record in records if record["type"] == "token"]


def assert_self_contained(source: str) -> None:
    parsed = Parsed(source)
    for _, attributes in parsed.elements:
        assert not set(attributes) & {"src", "href", "action", "srcset", "style", "onclick"}
    assert len(parsed.scripts) == 2 and len(parsed.styles) == 1
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", parsed.styles[0])
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket", parsed.scripts[1])
    policy = next(a["content"] for _, a in parsed.elements if "http-equiv" in a)
    for directive, content in (("script", parsed.scripts[1]), ("style", parsed.styles[0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "connect-src 'none'" in policy


@pytest.fixture(scope="module")
def samples():
    return sampled(60)


def test_page_is_self_contained(samples):
    assert_self_contained(page(samples, title="t"))
    assert_self_contained(page([], title="nothing yet"))


def test_all_text_is_there_in_order_without_scripts(samples):
    source = page(samples, title="t")
    parsed = Parsed(source)
    assert CHINESE[:10] in parsed.text and "👩‍🔬" in parsed.text
    assert parsed.text == spelled(joined_text(samples))
    assert "JavaScript, which is switched off" in source


def test_the_page_carries_the_records_as_they_are(samples):
    assert Parsed(page(samples, title="t")).records() == samples


@pytest.mark.thorough
@for_all(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=12))
@example([piece.decode() for piece in NASTY])
@example(["<script>", "alert(1)", "</script>", "\ud800"])
@settings(max_examples=60, deadline=None)
def test_any_text_stays_text(pieces):
    records = given([piece.encode("utf-8", "surrogatepass") for piece in pieces])
    for record, piece in zip(tokens_of(records), pieces, strict=True):
        record |= {"text": piece, "token": piece, "utf8": "ok"}
    title = "".join(pieces)
    source = page(records, title=title)
    source.encode()
    parsed = Parsed(source)
    assert parsed.text == spelled(title)
    assert len(parsed.scripts) == 2 and parsed.title == spelled(title).replace("\n", r"\n").replace(
        "\t", r"\t"
    )
    assert [record["token"] for record in tokens_of(parsed.records())] == pieces


@for_all(st.lists(st.binary(min_size=1, max_size=5), min_size=1, max_size=20, unique=True))
@example(NASTY)
@example(SPLIT)
@example([b"\xe4", b"\xb8"])
@settings(max_examples=80, deadline=None)
def test_any_bytes_make_a_page_and_safe_terminal_text(pieces):
    records = given(pieces)
    parsed = Parsed(page(records, title="t"))
    assert parsed.records() == records and len(parsed.scripts) == 2
    assert parsed.text == spelled(joined_text(records))
    for environ in ({}, {"COLORTERM": "truecolor"}):
        painted = paint_tokens(records, environ)
        painted.encode()
        plain = re.sub(r"\x1b\[[0-9;]*m", "", painted)
        assert {c for c in plain if unicodedata.category(c) in ("Cc", "Cf")} <= {*"\n\u200c\u200d"}


def test_levels_of_probability_reach_both_ends_and_never_beyond():
    assert [scales.probability_level(x) for x in (0.0, 1e-9, -1e9)] == [0, 0, 24]


# Machado, Oliveira and Fernandes 2009, severity 1.0, for linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def seen_linear(colours, blindness):
    srgb = np.array(colours) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.clip(linear @ np.array(BLINDNESS[blindness]).T, 0, 1)


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("theme", scales.THEMES)
def test_scales_are_ordered_by_lightness_for_every_eye(theme, blindness):
    weights = np.array([0.2126, 0.7152, 0.0722])
    lightness = np.cbrt(seen_linear(scales.sequential(theme), blindness) @ weights)
    steps = np.diff(lightness) * (1 if theme == "dark" else -1)
    assert steps.min() > 0 and lightness.max() - lightness.min() > 0.55
    ends = seen_linear(scales.diverging(theme), blindness)
    middle = np.cbrt(ends @ weights)[8]
    assert (np.abs(np.cbrt(ends @ weights)[[0, 16]] - middle) > 0.3).all()
    # Likelier and less likely must not look alike either: they differ in blue against red.
    blue_minus_red = np.cbrt(ends[:, 2]) - np.cbrt(ends[:, 0])
    assert blindness == "tritanopia" or (np.diff(blue_minus_red[[3, 8, 13]]) > 0.05).all()


@pytest.mark.parametrize("theme", scales.THEMES)
def test_ink_can_be_read_on_every_level(theme):
    for colour in scales.sequential(theme) + scales.diverging(theme):
        luminance = seen_linear([colour], "none")[0] @ [0.2126, 0.7152, 0.0722]
        ink = {"#000": 0.0, "#fff": 1.0}[scales.ink_on(colour)]
        light, dark = max(ink, luminance), min(ink, luminance)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("theme", scales.THEMES)
def test_curves_of_six_runs_are_told_apart_by_every_eye_and_from_the_paper(theme):
    """Farther from each other than 30 in CIELAB (D65), and a contrast of 3 to the paper."""
    place = scales.THEMES.index(theme)
    css = (ROOT / "llm/pages/report.css").read_text() + (ROOT / "llm/pages/page.css").read_text()
    found = re.findall(r"--(?:run\d|paper): light-dark\((#\w+), (#\w+)\)", css)
    colours = [[int(pair[place][i : i + 2], 16) for i in (1, 3, 5)] for pair in found]
    assert len(colours) == 7
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
    for blindness in BLINDNESS:
        xyz = seen_linear(colours[:6], blindness) @ to_xyz.T / to_xyz.sum(1)
        f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
        lab = f @ np.array([[0, 500, 0], [116, -500, 200], [0, 0, -200]])
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
        assert apart[~np.eye(6, dtype=bool)].min() > 30, blindness
    *lines, paper = seen_linear(colours, "none") @ to_xyz[1] + 0.05
    assert all(max(line, paper) / min(line, paper) > 3 for line in lines)


def test_no_field_of_a_record_can_bring_an_element_into_a_page():
    evil = '"><h1 id=evil>'
    records = given([b"a", b"b"])
    records[1:3] = [
        record | {"sample": evil, "phase": evil, "id": evil, "rank": evil if n else None}
        for n, record in enumerate(records[1:3])
    ]
    records[-1]["sample"] = evil
    source = page(records, title="t")
    assert not [
        tag for tag, attributes in Parsed(source).elements if attributes.get("id") == "evil"
    ]


def test_writing_replaces_the_file_as_a_whole(tmp_path, samples):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_output(path, page([{"type": "token", "sample": 0}], title="t").encode(), UsageError)
    assert path.read_text() == "old"
    write_output(path, page(samples, title="t").encode(), UsageError)
    assert path.read_text("utf-8") == page(samples, title="t")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_page_that_cannot_be_written_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write .*missing.page\.html: No such file"):
        write_output(tmp_path / "missing" / "page.html", b"page", UsageError)


def test_only_an_ordinary_file_is_replaced(tmp_path, samples):
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    link.symlink_to(file)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, pipe):
        write_output(path, b"all", UsageError)
    assert link.is_symlink() and file.read_bytes() == b"all"
    assert pipe.is_fifo() and os.read(reader, 9) == b"all"
    os.close(reader)
    with pytest.raises(UsageError, match=f"cannot write {tmp_path}: Is a directory; name a file"):
        write_output(tmp_path, b"all", UsageError)


def test_large_dumps_stay_small():
    source = page(sampled(1000, 1), title="t")
    assert len(source.encode()) < 400 * 1000


TEXT = "def wrap(self, text):\n    return 道\n"


def test_diff_page_carries_both_values():
    before, after = scored(TEXT, doubt=30.0, step=200), scored(TEXT, doubt=0.5)
    source = diff_page(before, after, title="t")
    assert_self_contained(source)
    parsed = Parsed(source)
    assert parsed.text == TEXT
    assert parsed.data()["before"] == before[0] and parsed.records()[0] == after[0]
    shown = tokens_of(parsed.records())
    for token, old, new in zip(shown, tokens_of(before), tokens_of(after), strict=True):
        assert token.pop("before") == {k: old[k] for k in ("logprob", "rank", "entropy", "top")}
        assert token == new


def test_diff_page_leaves_the_records_as_they_were():
    before, after = scored(TEXT), scored(TEXT)
    copy = json.dumps(after)
    diff_page(before, after, title="t")
    assert json.dumps(after) == copy


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TEXT.replace("text", "line"), r"part at token 5 of sample 0: the first has ' text'"),
        (TEXT + "x", r"part at token \d+ of sample 0: the first has ended, the second has 'x'"),
    ],
)
def test_diff_of_different_texts_says_where_they_part(other, message):
    with pytest.raises(UsageError, match=message):
        diff_page(scored(TEXT), scored(other), title="t")


def test_diff_of_different_tokenizers_or_counts_is_a_usage_error(samples):
    other = scored(TEXT)
    other[0] = other[0] | {"tokenizer": other[0]["tokenizer"] | {"sha256": "ee" * 32}}
    with pytest.raises(UsageError, match="different tokenizers"):
        diff_page(scored(TEXT), other, title="t")
    with pytest.raises(UsageError, match="different numbers of samples, 1 and 2"):
        diff_page(scored(TEXT), samples, title="t")


SGR = re.compile(r"\x1b\[([0-9;]*)m")


def painted_characters(painted: str) -> list[tuple[str, str]]:
    """Each character with the background that is on when a terminal meets it."""
    background, found, at = "", [], 0
    for match in [*SGR.finditer(painted), None]:
        until = match.start() if match else len(painted)
        found += [(character, background) for character in painted[at:until]]
        if match:
            at = match.end()
            if match[1] == "0":
                background = ""
            elif colours := re.search(r"48;(5;\d+|2;\d+;\d+;\d+)", match[1]):
                background = colours[0]
    return found


def body_of(painted: str, records) -> list[tuple[str, str]]:
    """The characters after the legend and the sample's heading."""
    characters = painted_characters(painted)
    lines = "".join(c for c, _ in characters).split("\n")
    start = sum(len(line) + 1 for line in lines[:3])
    return characters[start:]


def test_terminal_colours_a_character_by_the_token_that_closes_it():
    records = scored("道可道\n")
    palette = scales.sequential("dark")
    body = body_of(paint_tokens(records, {"COLORTERM": "truecolor"}), records)
    emitted = [(c, token) for token in tokens_of(records) for c in token["text"]]
    assert [c for c, _ in body[:3]] == list("道可道")
    for (shown, background), (character, token) in zip(body[:3], emitted, strict=False):
        level = scales.probability_level(token["logprob"])
        red, green, blue = palette[level]
        assert token["utf8"] == "close" and shown == character
        assert background == (f"48;2;{red};{green};{blue}" if level else "")


def test_terminal_gets_256_colours_unless_it_knows_more():
    records = scored(TEXT)
    assert "48;2;" not in paint_tokens(records, {})
    assert re.search(r"\x1b\[[\d;]*38;5;\d+;48;5;\d+m", paint_tokens(records, {"COLORTERM": ""}))
    assert "48;5;" not in paint_tokens(records, {"COLORTERM": "24bit"})
    light = paint_tokens(records, {"COLORTERM": "truecolor", "COLORFGBG": "0;15"})
    assert light != paint_tokens(records, {"COLORTERM": "truecolor", "COLORFGBG": "15;0"})


@pytest.mark.parametrize(("paper", "direction"), [("0", 1), ("15", -1)])
def test_the_256_colours_go_one_way_too(paper, direction):
    records = given([b"a"] * 60)
    for record, p in zip(tokens_of(records), np.linspace(1, 0.001, 60), strict=True):
        record["logprob"] = math.log(p)
    painted = paint_tokens(records, {"COLORFGBG": f"7;{paper}"})
    body = painted[painted.index("sample 0") :]
    cube = np.array([0, 95, 135, 175, 215, 255])
    indexes = np.array([int(n) - 16 for n in re.findall(r"48;5;(\d+)", body)])
    colours = cube[np.stack([indexes // 36, indexes // 6 % 6, indexes % 6], -1)]
    luminance = seen_linear(colours, "none") @ [0.2126, 0.7152, 0.0722]
    assert len(set(indexes)) == 12 and (np.diff(luminance) * direction >= 0).all()


def test_no_colour_is_on_where_a_line_ends():
    for character, background in painted_characters(paint_tokens(sampled(60), {})):
        assert character != "\n" or background == ""


def test_names_in_records_cannot_steer_the_terminal():
    records = given([b"a"])
    records[-1]["finish"] = "\x1b]0;owned\x07"
    records[1] |= {"token": "\x1b[2J", "text": "\x1b[2J\r"}
    painted = paint_tokens(records, {})
    assert set(re.sub(SGR, "", painted)) & set("\x1b\x07\r") == set()
    assert r"\x1b[2J\r" in re.sub(SGR, "", painted)


def test_terminal_text_streams_as_records_come(samples):
    seen = []

    def watched():
        for record in samples:
            seen.append(record)
            yield record

    first_text = next(
        len(seen) for part in paint_stream(watched(), {}) if "wrap" in re.sub(SGR, "", part)
    )
    assert first_text < 12


def causal_weights(layers=2, heads=3, length=5):
    scores = np.random.default_rng(0).normal(size=(layers, heads, length, length)) * 2
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def test_attention_page_carries_every_weight():
    pieces = [b"a", b"</script>", b"\xe4", b" b", b"\n"]
    weights, tokens = causal_weights(), tokens_of(given(pieces))
    source = attention_page(weights, tokens, title="<t>")
    assert_self_contained(source)
    parsed = Parsed(source)
    assert parsed.text == joined_text(tokens)
    data, shown = parsed.data(), ("token", "bytes", "text", "utf8")
    assert data["tokens"] == [{name: token[name] for name in shown} for token in tokens]
    stored = np.frombuffer(zlib.decompress(base64.b64decode(data["weights"])), np.uint8)
    stored = stored.reshape(2, 3, 15)
    rows, columns = np.tril_indices(5)
    np.testing.assert_allclose((stored / 255.0) ** 2, weights[:, :, rows, columns], atol=0.004)


def test_example_text_has_what_these_tests_are_about():
    assert "\u200d" in EMOJI and len(CHINESE.encode()) == 3 * len(CHINESE) - 2
