"""The live page as a document: what it may load and ask, what it says before anything is written.

What it does in a browser is in test_live_page.py.
"""

import base64
import hashlib
import re

import pytest
from example_records import NGram, records_of
from test_view import Parsed

from llm.config import SamplingConfig
from llm.pages.live_view import live_page
from llm.serving.completions import CompletionRequest

NAME = "<script>alert(1)</script> & \u202eco"


def fields(parsed: Parsed) -> dict[str, dict]:
    return {a["name"]: a for tag, a in parsed.elements if a.get("type") == "number"}


@pytest.fixture(scope="module")
def source():
    run = records_of(NGram(" ab ab ab"), [])[0]
    defaults = SamplingConfig(prompt="</script>\n\u2028", max_new_tokens=500, temperature=0.35)
    return live_page(NAME, context_length=64, vocab_size=9, run=run, defaults=defaults)


def test_only_its_own_script_and_style_run_and_only_its_server_is_asked(source):
    parsed = Parsed(source)
    policy = next(a["content"] for _, a in parsed.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none';") and "connect-src 'self';" in policy
    for directive, content in (("script", parsed.scripts[1]), ("style", parsed.styles[0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive}-src 'sha256-{digest}';" in policy
    assert len(parsed.scripts) == 2 and len(parsed.styles) == 1
    for _, attributes in parsed.elements:
        assert not set(attributes) & {"src", "href", "action", "srcset", "style"}
        assert not any(name.startswith("on") for name in attributes)


def test_its_script_never_makes_html_of_text(source):
    script = Parsed(source).scripts[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    assert re.findall(r"fetch\(([^,]*),", script) == ['"v1/completions"']


def test_a_name_that_looks_like_html_is_spelled(source):
    parsed = Parsed(source)
    assert parsed.title == r"<script>alert(1)</script> & \u202eco"
    assert parsed.data()["live"]["model"] == NAME


def test_settings_begin_with_the_run_and_stay_within_the_server():
    page = live_page(
        "m",
        context_length=64,
        vocab_size=9,
        defaults=SamplingConfig(max_new_tokens=500, temperature=0.35, min_p=0.05, seed=7),
        most_tokens=48,
        top=10,
        most_top=5,
    )
    found = fields(Parsed(page))
    values = {name: (a.get("value"), a.get("max")) for name, a in found.items()}
    assert values == {
        "max_tokens": ("48", "48"), "temperature": ("0.35", None), "top_k": ("0", None),
        "top_p": ("1", "1"), "min_p": ("0.05", "1"), "seed": (None, str(2**53 - 1)),
        "records": ("5", "5"),
    }  # fmt: skip
    assert fields(Parsed(live_page("m", context_length=64, vocab_size=9)))["max_tokens"][
        "value"
    ] == str(min(64, SamplingConfig().max_new_tokens))


def test_every_setting_is_a_field_of_the_servers_requests(source):
    assert set(fields(Parsed(source))) <= set(CompletionRequest.model_fields)


def test_each_setting_has_a_label_and_a_meaning(source):
    labels = [a for tag, a in Parsed(source).elements if tag == "label" and "title" in a]
    assert len(labels) == len(fields(Parsed(source)))
    assert all(len(a["title"]) > 5 for a in labels)


def test_the_prompt_of_the_run_arrives_whole(source):
    assert Parsed(source).data()["live"]["prompt"] == "</script>\n\u2028"
    source.encode()  # a lone surrogate cannot be sent as it is


def test_nothing_to_do_is_offered_without_scripts(source):
    form = next(a for tag, a in Parsed(source).elements if a.get("id") == "compose")
    assert "hidden" in form and "<noscript>" in source
