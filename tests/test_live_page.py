"""The live page in a browser, against the real server and against one that misbehaves on request.

Needs Chromium, its driver and selenium, and starlette and uvicorn for the real server; skipped
where one of them is missing. Nothing waits for a time: what a server must not finish too early, it
holds until the test lets go.
"""

import json
import math
import os
import re
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from example_records import CHINESE, EMOJI, NGram, given, records_of, training_text
from runs import ROOT, train, write_config

from llm.config import SamplingConfig
from llm.inference.records import read_records
from llm.pages.live_view import live_page

pytest.importorskip("selenium")
import test_browser
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from test_browser import (
    colour,
    find,
    find_all,
    hover,
    media,
    metrics,
    panel,
    press,
    shown,
)
from test_view import spelled

browser = test_browser.browser
pytestmark = test_browser.pytestmark

CONTEXT = 400
PROMPT = "    def wrap(self, text):\n        "
WHOLE = "👩‍🔬 🌍道可"


class Standin(ThreadingHTTPServer):
    """Speaks as the real server does, with a model of counts behind it.

    Attributes:
      requests: what was asked, in order.
      answer: called with the handler and a request in place of `complete`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = NGram(training_text())
        self.requests, self.answer = [], complete

    def records(self, request):
        """Of one completion."""
        prompt, settings = request["prompt"], request
        if isinstance(prompt, str):
            prompt = self.model.encode(prompt) or [self.model.end_of_text]
        sampling = {
            name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")
        }
        sampling["top_k"] = sampling["top_k"] or self.model.vocab_size
        count = min(request["max_tokens"], CONTEXT - len(prompt))
        return records_of(
            self.model, [(list(prompt), count)], sampling=sampling, top=request["records"]
        )


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if self.path != "/":
            return self.send_error(404)
        model = self.server.model
        defaults = SamplingConfig(max_new_tokens=40, top_p=0.95)
        page = live_page(
            "<b>pieces & counts",
            context_length=CONTEXT,
            vocab_size=model.vocab_size,
            run=records_of(model, [])[0],
            defaults=defaults,
        )
        self.begin(200, "text/html; charset=utf-8")
        self.wfile.write(page.encode())

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.answer(self, request)

    def begin(self, status=200, kind="text/event-stream"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def event(self, records, end="\n\n"):
        self.wfile.write(f"data: {json.dumps({'choices': [], 'records': records})}{end}".encode())


def complete(handler, request):
    handler.begin()
    handler.event(handler.server.records(request))
    handler.wfile.write(b"data: [DONE]\n\n")


class Held:
    """An answer whose second half waits for `release`."""

    def __init__(self):
        self.gate = threading.Event()

    def __call__(self, handler, request):
        records = handler.server.records(request)
        middle = len(records) - 20
        handler.begin()
        handler.event(records[:middle])
        assert self.gate.wait(60)
        handler.event(records[middle:])
        handler.wfile.write(b"data: [DONE]\n\n")

    def release(self):
        self.gate.set()


@pytest.fixture(scope="module")
def server():
    standin = Standin()
    threading.Thread(target=standin.serve_forever, daemon=True).start()
    yield standin
    standin.shutdown()


@pytest.fixture
def standin(server):
    server.requests.clear()
    server.answer = complete
    return server


@pytest.fixture
def live(browser, standin):
    """The page of the stand-in, freshly opened; a script that failed fails the test."""
    open_at(browser, f"http://127.0.0.1:{standin.server_port}/")
    yield browser
    assert [one for one in browser.get_log("browser") if one["source"] != "network"] == []


def open_at(browser, address):
    media(browser)
    metrics(browser, 1300)
    browser.get_log("browser")
    browser.get("about:blank")  # else the browser puts back what was typed before
    browser.get(address)


def eventually(browser, condition):
    """On a busy machine a model may compile for a while before it says its first token."""
    WebDriverWait(browser, 120, poll_frequency=0.05).until(lambda _: condition())


def fill(browser, **settings):
    for name, value in settings.items():
        field = find(browser, f"[name={name}]")
        field.clear()
        field.send_keys(str(value))


def write(browser, prompt, **settings):
    """Asks for a text and waits for its end; the records that came."""
    fill(browser, **settings)
    find(browser, "#prompt").clear()
    find(browser, "#prompt").send_keys(prompt)
    find(browser, "#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    finished(browser)
    return received(browser)


def finished(browser):
    """Waits until nothing is asked for any more and everything that came is drawn."""
    idle = "return !livePage.running && !livePage.drawing && !tokenPage.drawing"
    eventually(browser, lambda: browser.execute_script(idle))


def received(browser):
    lines = browser.execute_script("return livePage.current.jsonLines")
    return [json.loads(line) for line in lines.splitlines()]


def tokens_of(records):
    return [record for record in records if record["type"] == "token"]


def text(browser):
    boxes = find_all(browser, "#samples .text")
    return boxes[0].get_attribute("textContent") if boxes else ""


def text_of(records):
    """What the page shows of records: a token without bytes by its name, unless it flushes a
    character that was left open, and no control characters."""
    texts = [
        token["text"] or ("" if token["bytes"] else token["token"]) for token in tokens_of(records)
    ]
    return spelled("".join(texts))


def status(browser):
    return find(browser, "#progress").text


def choose(browser, index, place):
    """Clicks a token, then one of its alternatives; the id of that."""
    find(browser, f"#s0t{index}").click()
    item = find_all(browser, "#panel .alternatives li")[place]
    chosen = int(item.get_attribute("title").split("·")[0].split()[1])
    item.find_element(By.CSS_SELECTOR, "button").click()
    return chosen


def test_the_page_introduces_the_model_and_its_settings(live):
    assert live.title == find(live, "h1").text == "<b>pieces & counts"
    assert "runs/example" in find(live, "#run").text
    assert "sampling" not in find(live, "#run").text
    fields = find_all(live, ".settings label")
    values = {one.text: one.find_element(By.TAG_NAME, "input").get_attribute("value")
              for one in fields}  # fmt: skip
    assert values == {
        "Max tokens": "40", "Temperature": "0.8", "Top-k": "0", "Top-p": "0.95", "Min-p": "0",
        "Seed": "", "Alternatives": "10",
    }  # fmt: skip
    assert find(live, "#prompt").accessible_name == "Text to continue"
    assert not find(live, "#after").is_displayed() and not find(live, "#branches").is_displayed()


def test_writing_sends_the_settings_and_shows_what_comes(live, standin):
    records = write(live, PROMPT, max_tokens=30, temperature=0.7, top_k=9, min_p=0.01, records=4)
    (request,) = standin.requests
    seed = request.pop("seed")
    assert request == {
        "model": "<b>pieces & counts", "prompt": PROMPT, "echo": True, "stream": True,
        "max_tokens": 30, "temperature": 0.7, "top_k": 9, "top_p": 0.95, "min_p": 0.01,
        "records": 4,
    }  # fmt: skip
    assert 0 <= seed < 2**31 and f"seed {seed}" in find(live, "#run").text
    assert records == standin.records(request | {"seed": seed})
    assert text(live) == records[-1]["text"]
    end = records[-1]
    said = status(live)
    assert f"{end['tokens']} tokens written" in said and f"finish: {end['finish']}" in said
    assert f"{-end['sum_logprob']:.2f} nats" in said
    assert f"{end['bits_per_byte']:.2f} bits per byte" in said
    assert f"finish: {end['finish']}" in find(live, "#say").get_attribute("textContent")


def test_a_given_seed_is_sent_and_a_wrong_setting_is_not(live, standin):
    write(live, "def ", seed=2**53 - 1)
    fill(live, top_p="1.5")
    find(live, "#write").click()
    find(live, "#score").click()
    assert len(standin.requests) == 1 and standin.requests[0]["seed"] == 2**53 - 1
    assert live.execute_script("return document.querySelectorAll('#compose :invalid').length") == 1


def test_tokens_are_shown_as_they_come(live, standin):
    standin.answer = held = Held()
    find(live, "#prompt").send_keys(PROMPT)
    find(live, "#write").click()
    eventually(live, lambda: "writing" in status(live))
    assert find(live, "#samples").get_attribute("aria-busy") == "true"
    assert find(live, "#stop").is_enabled()
    whole = standin.records(standin.requests[0])
    assert text(live) == text_of(whole[:-20])
    hover(live, "#s0t9")
    assert shown(live) == 9 and f"of {len(whole) - 21}" in panel(live)
    held.release()
    finished(live)
    assert text(live) == text_of(whole) and f"of {len(whole) - 2}" in panel(live)
    assert not find(live, "#stop").is_enabled()


def test_an_empty_text_is_written_too(live, standin):
    records = write(live, "", max_tokens=12)
    assert standin.requests[0]["prompt"] == ""
    assert text(live) == text_of(records) and text(live).startswith("<|endoftext|>")


def test_events_are_read_however_the_stream_is_cut(live, standin):
    def piecemeal(handler, request):
        run, *records = standin.records(request)
        handler.begin()
        lines = [": a comment", "", "event: records", data([run]), "", data(records[:7]), ""]
        lines += ["data:" + data(records[7:9])[5:].strip(), "id: 9", "", data(records[9:]), ""]
        stream = "\r\n".join([*lines, "data: [DONE]", "", ""]).encode()
        assert not stream.isascii()
        for cut in range(len(stream)):
            handler.wfile.write(stream[cut : cut + 1])

    def data(records):
        return "data: " + json.dumps({"records": records}, ensure_ascii=False)

    standin.answer = piecemeal
    records = write(live, WHOLE, max_tokens=25)
    assert records == standin.records(standin.requests[0])
    assert text(live) == records[-1]["text"] and text(live).startswith(WHOLE)
    shared = [cell.text for cell in find_all(live, ".cell > b")]
    assert shared[:3] == ["👩", "\u200d", "🔬"] or "🔬" in "".join(shared)


def test_the_parser_agrees_with_the_standard(live):
    """Cases of https://html.spec.whatwg.org/multipage/server-sent-events.html, cut everywhere."""
    streams = {
        "data: a\n\ndata: b\n\n": ["a", "b"],
        "data: YHOO\ndata: +2\ndata: 10\n\n": ["YHOO\n+2\n10"],
        ": test\n\ndata: first\nid: 1\n\ndata:second\nid\n\ndata:  third\n\n":
            ["first", "second", " third"],
        "data\n\ndata\ndata\n\ndata:": ["", "\n"],
        "data: x\r\rdata: y\r\n\r\ndata: z\n\r": ["x", "y", "z"],
        "data: a\r\ndata: b\r\n\r\n": ["a\nb"],
        "data: not finished": [],
    }  # fmt: skip
    script = (
        "const [text, size] = arguments, parser = new EventParser(), found = [];"
        "for (let i = 0; i < text.length; i += size) found.push(...parser.push("
        "text.slice(i, i + size))); found.push(...parser.push('')); return found"
    )
    for stream, events in streams.items():
        if stream.endswith("\r"):
            stream += "\n"
        for size in (1, 2, 3, 1000):
            assert live.execute_script(script, stream, size) == events, (stream, size)


def test_an_alternative_goes_on_in_place_of_a_token(live, standin):
    before = write(live, PROMPT, max_tokens=40, seed=5)
    index = len(tokens_of(before)) - 12
    chosen = choose(live, index, 1)
    finished(live)
    ids = [token["id"] for token in tokens_of(before)]
    assert standin.requests[1]["prompt"] == [*ids[:index], chosen]
    after = received(live)
    assert [token["id"] for token in tokens_of(after)][: index + 1] == [*ids[:index], chosen]
    assert text(live) == text_of(after) != text_of(before)
    assert shown(live) == index and "chosen" in find_all(live, "#panel .alternatives li")[
        1
    ].get_attribute("class")
    # What was drawn before is still said to have been drawn, and the alternative to be given.
    phases = [part.get_attribute("class") for part in find_all(live, "#samples .text > span")]
    assert phases == ["prompt", "generated", "prompt", "generated"]


def test_earlier_branches_can_be_shown_again(live, standin):
    first = write(live, PROMPT, max_tokens=40, seed=5)
    choose(live, 20, 1)
    finished(live)
    second = received(live)
    choose(live, 30, 2)
    finished(live)
    third = received(live)
    buttons = find_all(live, "#branches ol button")
    assert [one.text.split()[0] for one in buttons] == ["1", "2", "3"]
    assert "from 2, token 31" in buttons[2].text
    for place, records in ((0, first), (2, third), (1, second)):
        buttons[place].click()
        finished(live)
        assert text(live) == text_of(records) and received(live) == records
        assert find_all(live, "#samples .text > span:empty") == []
        assert buttons[place].get_attribute("aria-current") == "true"
        assert len(find_all(live, "#branches [aria-current]")) == 1
    for records in (third, first, third):
        find(live, "#back").click()
        finished(live)
        assert text(live) == text_of(records)


def test_a_branch_can_be_taken_while_a_text_is_written(live, standin):
    standin.answer = held = Held()
    find(live, "#prompt").send_keys(PROMPT)
    find(live, "#write").click()
    eventually(live, lambda: "writing" in status(live))
    came = text(live)
    standin.answer = complete
    choose(live, 12, 1)
    finished(live)
    held.release()
    assert text(live) == text_of(received(live))
    find(live, "#back").click()
    finished(live)
    assert text(live) == came and "stopped" in status(live)


def test_what_was_drawn_keeps_the_settings_it_was_drawn_with(live, standin):
    before = write(live, PROMPT, max_tokens=40, seed=5, temperature=0.5)
    index = next(
        i for i, token in enumerate(tokens_of(before))
        if token["phase"] == "generated" and sum(one["kept"] for one in token["top"]) > 2
    )  # fmt: skip
    find(live, f"#s0t{index}").click()
    titles = [one.get_attribute("title") for one in find_all(live, "#panel .alternatives li")]
    assert "drawn with" in titles[0]
    fill(live, temperature=2)
    choose(live, index + 1, 1)
    finished(live)
    assert "temperature 2" in find(live, "#run").text
    find(live, f"#s0t{index}").click()
    again = [one.get_attribute("title") for one in find_all(live, "#panel .alternatives li")]
    assert again == titles


def test_stopping_keeps_what_came_and_frees_the_server(live, standin):
    left = threading.Event()

    def endless(handler, request):
        records = standin.records(request)
        handler.begin()
        handler.event(records[:-20])
        try:
            while True:
                handler.wfile.write(b": still here\n\n")
        except OSError:
            left.set()

    standin.answer = endless
    find(live, "#prompt").send_keys(PROMPT)
    find(live, "#write").click()
    eventually(live, lambda: "writing" in status(live))
    came = text(live)
    find(live, "#stop").click()
    finished(live)
    assert left.wait(60)
    assert text(live) == came == text_of(standin.records(standin.requests[0])[:-20])
    assert "stopped" in status(live) and not find(live, "#error").is_displayed()
    assert find(live, "#prompt").get_attribute("value") == PROMPT


def test_going_on_continues_from_the_very_tokens(live, standin):
    first = write(live, PROMPT, max_tokens=20)
    find(live, "#go-on").click()
    finished(live)
    ids = [token["id"] for token in tokens_of(first)]
    assert standin.requests[1]["prompt"] == ids
    assert text(live) == text_of(received(live)) and text(live).startswith(text_of(first))
    counts = [sum(t["phase"] == "generated" for t in tokens_of(one))
              for one in (first, received(live))]  # fmt: skip
    assert f"{sum(counts)} tokens written" in status(live)


def test_a_character_that_the_end_cut_is_whole_when_the_text_goes_on(live, standin):
    pieces = [b"a", b"\xf0\x9f", b"\x8c\x8d", b"!"]
    whole, cut = given(pieces), given(pieces[:2])
    for token in tokens_of(whole)[1:2]:
        assert token["utf8"] == "open"
    cut[0], answers = whole[0], [cut, whole]

    def scripted(handler, request):
        handler.begin()
        handler.event(answers[len(standin.requests) - 1])
        handler.wfile.write(b"data: [DONE]\n\n")

    standin.answer = scripted
    write(live, "a")
    assert text(live) == "a\ufffd"
    find(live, "#go-on").click()
    finished(live)
    assert standin.requests[1]["prompt"] == [0, 1]
    assert text(live) == "a🌍!" and len(find_all(live, ".cell .t")) == 2


def test_bytes_that_are_no_utf8_come_one_by_one(live, standin):
    """A byte may end one broken character and begin the next."""
    records = given([b"a", b"\xe3", b"\xe8", b"\xa6", b"\x86", b"\xff", b"\xf0\x9f", b"z", b"\x80"])
    run, *rest = records
    assert "bad" in [record.get("utf8") for record in rest]

    def one_by_one(handler, request):
        handler.begin()
        handler.event([run])
        for record in rest:
            handler.event([record])
        handler.wfile.write(b"data: [DONE]\n\n")

    standin.answer = one_by_one
    write(live, "a")
    assert text(live) == rest[-1]["text"] == "a\ufffd覆\ufffd\ufffdz\ufffd"


def test_scoring_shows_the_text_and_writes_nothing(live, standin):
    find(live, "#prompt").send_keys(PROMPT)
    find(live, "#score").click()
    finished(live)
    assert standin.requests[0]["max_tokens"] == 0
    assert text(live) == PROMPT
    model = standin.model
    ids = model.encode(PROMPT)
    total = -sum(model.logprobs(ids[:i])[ids[i]] for i in range(1, len(ids)))
    assert f"{len(ids) - 1} tokens predicted" in status(live)
    assert f"{total:.2f} nats" in status(live)
    assert f"perplexity {math.exp(total / (len(ids) - 1)):.2f}" in status(live)
    find(live, "#prompt").clear()
    find(live, "#score").click()
    assert "no text to score" in find(live, "#error").text and len(standin.requests) == 1


def refuse(status, body):
    def answer(handler, request):
        handler.begin(status, "application/json")
        handler.wfile.write(body.encode())

    return answer


def test_a_refusal_is_shown_and_takes_nothing_away(live, standin):
    records = write(live, PROMPT, max_tokens=20)
    message = "the prompt has 500 tokens, <b>the model's</b> context holds 400"
    standin.answer = refuse(400, json.dumps({"error": {"message": message, "code": None}}))
    find(live, "#prompt").send_keys(" and more")
    find(live, "#write").click()
    finished(live)
    assert find(live, "#error").text == message
    assert find(live, "#error").aria_role == "alert"
    assert find(live, "#prompt").get_attribute("value") == PROMPT + " and more"
    find(live, "#go-on").click()
    finished(live)
    assert find(live, "#error").text == message
    assert text(live) == text_of(records) and f"finish: {records[-1]['finish']}" in status(live)
    standin.answer = complete
    find(live, "#go-on").click()
    finished(live)
    assert not find(live, "#error").is_displayed()


def test_what_stands_before_a_server_may_answer_in_its_own_words(live, standin):
    standin.answer = refuse(502, "<html><h1>Bad gateway</h1>")
    find(live, "#write").click()
    finished(live)
    said = find(live, "#error").text
    assert "502" in said and "<h1>Bad gateway</h1>" in said


def test_an_error_in_mid_stream_keeps_what_came(live, standin):
    def fails(handler, request):
        records = standin.records(request)
        handler.begin()
        handler.event(records[:-20])
        error = {"error": {"message": "the logits are not finite", "type": "server_error"}}
        handler.wfile.write(f"data: {json.dumps(error)}\n\n".encode())

    standin.answer = fails
    write(live, PROMPT)
    assert find(live, "#error").text == "the logits are not finite"
    assert text(live) == text_of(standin.records(standin.requests[0])[:-20])
    assert "broken off" in status(live)


@pytest.mark.parametrize("way", ["closed", "torn"])
def test_a_server_that_goes_away_is_said_to(live, standin, way):
    gate = threading.Event()

    def leaves(handler, request):
        records = standin.records(request)
        if way == "torn":  # a chunk is announced that never comes whole
            handler.protocol_version = "HTTP/1.1"
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            data = f"data: {json.dumps({'records': records[:-20]})}\n\n".encode()
            handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\nfff\r\ndata")
            handler.close_connection = True
        else:
            handler.begin()
            handler.event(records[:-20])
        assert gate.wait(60)

    standin.answer = leaves
    find(live, "#prompt").send_keys(PROMPT)
    find(live, "#write").click()
    eventually(live, lambda: "writing" in status(live))
    gate.set()
    finished(live)
    assert "went away" in find(live, "#error").text
    assert text(live) == text_of(standin.records(standin.requests[0])[:-20])
    assert "broken off" in status(live)
    assert find(live, "#prompt").get_attribute("value") == PROMPT


def test_saved_records_are_those_that_came(live, standin, tmp_path):
    live.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    records = write(live, CHINESE[:6] + EMOJI, max_tokens=10, seed=3)
    find(live, "#save").click()
    path = tmp_path / "-b-pieces-counts-1.jsonl"
    eventually(live, path.exists)
    assert path.read_bytes().isascii()
    assert read_records(path) == records == standin.records(standin.requests[0])


def test_text_that_looks_like_html_stays_text(live, standin):
    attack = [b"a", b"</script><script>window.hacked=1</script>",
              b"<img src=x onerror=window.hacked=1>", b"&lt;b&gt;", b"z"]  # fmt: skip
    records = given(attack)
    standin.answer = lambda handler, request: (
        handler.begin(), handler.event(records), handler.wfile.write(b"data: [DONE]\n\n")
    )  # fmt: skip
    written = b"".join(attack).decode()
    find(live, "#prompt").send_keys(written)
    find(live, "#write").click()
    finished(live)
    assert text(live) == written
    records[3]["id"] = 99  # the branch has another token there
    choose(live, 2, 0)
    finished(live)
    assert text(live).startswith("a</script>")
    assert "<" in find(live, "#branches").text
    assert live.execute_script("return window.hacked ?? null") is None
    assert find_all(live, "img") == [] and len(find_all(live, "script")) == 2


def test_colours_strip_table_and_keys_work_on_a_live_text(live):
    records = write(live, PROMPT, max_tokens=40)
    hardest = min(
        (t for t in tokens_of(records) if t["logprob"] is not None), key=lambda t: t["logprob"]
    )
    seen = set()
    for mode in "prse":
        find(live, f"[for=by-{mode}]").click()
        seen.add(colour(live, f"#s0t{hardest['position']}"))
    assert len(seen) >= 2
    find(live, "#s0t5").click()
    press(live, Keys.ARROW_RIGHT)
    assert shown(live) == 6
    find(live, "#all summary").click()
    eventually(live, lambda: find_all(live, "tbody tr"))
    assert len(find_all(live, "tbody tr")) == len(tokens_of(records))
    assert len(find(live, "path.generated").get_attribute("d").split("M")) > 10


def test_a_branch_can_be_taken_by_the_keyboard(live, standin):
    write(live, PROMPT, max_tokens=40, seed=5)
    find(live, "#s0 .text").send_keys(Keys.END)
    place = shown(live)
    button = find_all(live, "#panel button.token")[2]
    live.execute_script("arguments[0].focus()", button)
    press(live, Keys.ENTER)
    finished(live)
    assert len(standin.requests) == 2 and shown(live) == place
    focused = live.switch_to.active_element
    assert "token" in focused.get_attribute("class")
    assert live.execute_script("return arguments[0].closest('.chosen') !== null", focused)


def test_it_fits_a_phone(live, standin):
    metrics(live, 390)
    width = "return document.documentElement.scrollWidth"
    write(live, PROMPT, max_tokens=40)
    find(live, "#prompt").send_keys("x" * 300)
    assert live.execute_script(width) <= 390
    find(live, "#s0t20").click()
    assert live.execute_script(width) <= 390
    find_all(live, "#panel button.token")[1].click()
    finished(live)
    assert live.execute_script(width) <= 390 and len(standin.requests) == 2


@pytest.mark.parametrize("height", [640, 844])
def test_on_a_phone_the_written_text_is_in_the_window(live, standin, height):
    size = {"width": 390, "height": height, "deviceScaleFactor": 1, "mobile": True}
    live.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    write(live, PROMPT, max_tokens=12)
    top = "return document.querySelector('#s0 .text').getBoundingClientRect().top"
    assert 0 <= live.execute_script(top) < height / 2


def test_without_scripts_it_says_what_it_needs(live, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.refresh()
        assert "needs JavaScript" in find(browser, "noscript").text
        assert not find(browser, "#compose").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_another_checkpoint_behind_the_server_is_not_mixed_with_the_one_before(live, standin):
    write(live, PROMPT, max_tokens=30, seed=5)
    other = NGram(training_text(), doubt=30.0)

    def another(handler, request):
        prompt = request["prompt"]
        records = records_of(other, [(prompt, 0)], step=9000)
        records[0]["checkpoint"]["params_sha256"] = "77" * 32
        handler.begin()
        handler.event(records)
        handler.wfile.write(b"data: [DONE]\n\n")

    standin.answer = another
    choose(live, 12, 1)
    finished(live)
    shown_tokens = live.execute_script("return livePage.current.tokens.map(t => t.logprob)")
    assert shown_tokens == [t["logprob"] for t in tokens_of(received(live))]
    assert "9,000" in find(live, "#run").text
    assert np.isfinite(shown_tokens[1:]).all()


# Prompts of 17 to 32 tokens, and 64 together: one program of each kind is compiled for all tests.
CAT, TOKENS = "the cat sat on the mat", 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of bytes that has hardly learnt: it writes many that are no UTF-8."""
    folder = tmp_path_factory.mktemp("live")
    settings = {"tokenizer": {"kind": "bytes"}, "model": {"context_length": 256}}
    train(write_config(folder, **settings, training={"steps": 4, "eval_every": 0}))
    return folder / "run"


@pytest.fixture(scope="module")
def decoder(run):
    """The same model without a server."""
    from llm.inference.decode import Decoder
    from llm.run.open import open_model

    opened = open_model(run)
    return Decoder.create(opened.spec, opened.params, opened.tokenizer)


@pytest.fixture(scope="module")
def served(run):
    """(process, address) of `python -m llm serve`."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    process = subprocess.Popen(
        [sys.executable, "-m", "llm", "serve", str(run), "--port", "0", "--max-batch", "1"],
        cwd=ROOT,
        env=dict(os.environ),
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if found := re.search(r"at (http://\S+)", line):
            break
    else:
        pytest.fail(f"the server ended with {process.wait()}")
    yield process, found[1]
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.fixture
def real(browser, served):
    """The page of the real server; a script that failed fails the test."""
    open_at(browser, served[1])
    yield browser
    assert [one for one in browser.get_log("browser") if one["source"] != "network"] == []


def assert_decoder_says(decoder, records):
    """The records are those of the decoder for the same prompt ids and settings."""
    from llm.inference.decode import Request
    from llm.inference.records import Sampling

    tokens = tokens_of(records)
    prompt = [token["id"] for token in tokens if token["phase"] == "prompt"]
    count = len(tokens) - len(prompt)
    request = Request(prompt, Sampling(**records[0]["sampling"]), max_new_tokens=count, top=10)
    said = [token for progress in decoder.generate([request]) for token in progress.tokens]
    assert [token.id for token in said] == [token["id"] for token in tokens]
    assert [token.text for token in said] == [token["text"] for token in tokens]
    assert said[0].logprob is None and tokens[0]["logprob"] is None
    for ours, theirs in zip(said[1:], tokens[1:], strict=True):
        assert theirs["logprob"] == pytest.approx(ours.logprob, abs=1e-4)
        drawn = ours.sampling_logprob
        assert theirs["sampling_logprob"] == (drawn and pytest.approx(drawn, abs=1e-4))
        best = ours.top[0].logprob
        assert theirs["top"][0]["logprob"] == pytest.approx(best, abs=1e-4)


@pytest.mark.thorough
def test_the_server_writes_what_the_decoder_says(real, decoder):
    records = write(real, CAT, max_tokens=TOKENS, seed=3, temperature=0.9)
    assert_decoder_says(decoder, records)
    assert text(real) == text_of(records) and text(real).startswith(CAT)
    assert "bytes, 257 tokens" in find(real, "#run").text
    assert f"finish: {records[-1]['finish']}" in status(real)
    find(real, "#s0t12").click()
    token = tokens_of(records)[12]
    assert shown(real) == 12 and f"rank {token['rank']}" in panel(real)
    assert f"{-token['logprob']:.2f} nats" in panel(real)


@pytest.mark.thorough
def test_a_branch_is_kept_text_and_alternative_and_what_the_decoder_says(real, decoder):
    before = write(real, CAT, max_tokens=TOKENS, seed=4)
    chosen = choose(real, 25, 3)
    finished(real)
    after = received(real)
    ids = [[token["id"] for token in tokens_of(records)] for records in (before, after)]
    assert ids[1][:26] == [*ids[0][:25], chosen] and len(ids[1]) > 26
    assert [token["phase"] for token in tokens_of(after)][25:27] == ["prompt", "generated"]
    assert_decoder_says(decoder, after)
    assert text(real) == text_of(after)
    # The alternative had this probability when it was only one of several, too.
    listed = tokens_of(before)[25]["top"][3]
    assert listed["id"] == chosen
    assert tokens_of(after)[25]["logprob"] == pytest.approx(listed["logprob"], abs=1e-4)
    find_all(real, "#branches ol button")[0].click()
    finished(real)
    assert text(real) == text_of(before) and received(real) == before


@pytest.mark.thorough
def test_emoji_of_bytes_are_whole_and_can_be_cut(real, decoder):
    records = write(real, "the cat " + WHOLE, max_tokens=TOKENS, seed=5)
    assert text(real) == text_of(records) and text(real).startswith("the cat " + WHOLE)
    cells = find_all(real, ".cell")
    assert cells[0].find_element(By.CSS_SELECTOR, "b").get_attribute("textContent") == "👩‍🔬"
    assert len(cells[0].find_elements(By.CSS_SELECTOR, ".t")) == len("👩‍🔬".encode())
    choose(real, 28, 0)  # inside the last character
    finished(real)
    assert_decoder_says(decoder, received(real))
    assert text(real) == text_of(received(real))


@pytest.mark.thorough
def test_scoring_on_the_server_sums_the_whole_text(real):
    fill(real, max_tokens=7)
    assert find(real, "#prompt").get_attribute("value") == "the"  # the run's own setting
    find(real, "#prompt").send_keys(" red hat")
    find(real, "#score").click()
    finished(real)
    *_, end = received(real)
    assert text(real) == "the red hat" and end["tokens"] == 10
    assert "10 tokens predicted" in status(real)
    assert f"{-end['sum_logprob']:.2f} nats" in status(real)
    assert f"perplexity {end['perplexity']:,.2f}" in status(real)
    assert "none, the text was given" in find(real, "#run").text


@pytest.mark.thorough
def test_a_prompt_beyond_the_context_is_refused_in_words(real):
    records = write(real, CAT, max_tokens=5)
    find(real, "#prompt").send_keys("x" * 300)
    find(real, "#write").click()
    finished(real)
    assert "322 tokens" in find(real, "#error").text and "256" in find(real, "#error").text
    assert text(real) == text_of(records)
    assert len(find(real, "#prompt").get_attribute("value")) == 322


@pytest.mark.thorough
def test_a_stop_frees_the_place_on_the_server(real, served):
    real.execute_script(
        "const add = livePage.add;"
        "livePage.add = function (branch) { add.call(this, branch); this.stop(); }"
    )
    write(real, CAT, max_tokens=200)
    assert "stopped" in status(real) and text(real).startswith(CAT)
    assert len(tokens_of(received(real))) < 222

    def active():
        with urllib.request.urlopen(f"{served[1]}/health", timeout=60) as answer:
            return json.load(answer)["active"]

    eventually(real, lambda: active() == 0)
    real.refresh()
    assert tokens_of(write(real, CAT, max_tokens=TOKENS, seed=3))[-1]["position"] > 22


@pytest.mark.thorough
def test_a_server_that_is_gone_is_said_to_and_nothing_is_lost(real, served):
    """The last test: the server does not come back."""
    records = write(real, CAT, max_tokens=9)
    served[0].kill()
    served[0].wait()
    find(real, "#write").click()
    finished(real)
    assert "cannot be reached" in find(real, "#error").text
    assert text(real) == text_of(records)
    assert find(real, "#prompt").get_attribute("value") == CAT
