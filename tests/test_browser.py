"""The pages in a browser: what a person points at, clicks and types, and what then can be seen.

Needs Chromium, its driver and selenium; skipped where one of them is missing. Nothing is served:
pages are opened from files.
"""

import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
from example_records import SAMPLING, NGram, given, sampled, scored, training_text
from test_view import spelled

from llm.pages.attention_view import attention_page
from llm.pages.live_view import live_page
from llm.pages.view import diff_page, page

selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver")

DIFF_TEXT = "def wrap(self, text):\n    return 道 + text\n"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "window-size=1300,900", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def records():
    return sampled(80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("pages")
    before, after = scored(DIFF_TEXT, doubt=30.0), scored(DIFF_TEXT, doubt=0.5)
    contents = {
        "tokens": page(records, title="Two samples"),
        "empty": page([], title="Two samples"),
        "one": page(records[: 1 + [r["type"] for r in records].index("end")], title="One"),
        "diff": diff_page(before, after, title="Two checkpoints"),
        "attention": attention_page(attention_weights(), records_of_text("abcdef"), title="Heads"),
    }
    for name, content in contents.items():
        (folder / f"{name}.html").write_text(content, "utf-8")
    return folder


@pytest.fixture
def open_page(browser, folder):
    """Opens a page; afterwards nothing may have been complained about or loaded."""

    def opened(name, content=None):
        path = folder / f"{name}.html"
        if content is not None:
            path.write_text(content, "utf-8")
        browser.get("about:blank")  # a change of the fragment alone would not load it again
        browser.get(path.as_uri())
        eventually(browser, lambda: filled(browser))
        return browser

    media(browser)
    metrics(browser, 1300)
    yield opened
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def filled(browser):
    """Whether the scripts have drawn what the page carries."""
    script = "return 'filled' in document.documentElement.dataset || Boolean(window.attentionPage)"
    return browser.execute_script(script)


def attention_weights():
    """Head (0, 0) looks at the token before, head (0, 1) at the first, layer 1 everywhere alike."""
    weights = np.zeros((2, 2, 6, 6), np.float32)
    for t in range(6):
        weights[0, 0, t, max(t - 1, 0)] = weights[0, 1, t, 0] = 1.0
        weights[1, :, t, : t + 1] = 1.0 / (t + 1)
    return weights


def records_of_text(text):
    return tokens_of(given([c.encode() for c in text]), 0)


def media(browser, scheme="light"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def metrics(browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def find_all(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def hover(browser, selector):
    # From elsewhere: a pointer that is there already enters nothing.
    heading, target = find(browser, "h1"), find(browser, selector)
    ActionChains(browser).move_to_element(heading).move_to_element(target).perform()


def eventually(browser, condition):
    """What follows a click as an event of its own may take a moment on a busy machine."""
    WebDriverWait(browser, 10, poll_frequency=0.05).until(lambda _: condition())


def open_table(browser):
    find(browser, "#all summary").click()
    eventually(browser, lambda: find_all(browser, "tbody tr"))


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


def panel(browser):
    return find(browser, "#panel").text


def shown(browser):
    """The index of the token that the panel shows."""
    return int(re.search(r"token ([\d,]+) of", panel(browser))[1].replace(",", "")) - 1


def colour(browser, selector):
    script = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    return browser.execute_script(script, selector)


def tokens_of(records, sample):
    return [r for r in records if r["type"] == "token" and r["sample"] == sample]


def percentage(text):
    return float(re.search(r"([\d.]+) %", text)[1]) / 100


@pytest.mark.thorough
def test_the_page_opens_on_the_most_surprising_token_that_was_drawn(open_page, records):
    generated = [r for r in records if r.get("phase") == "generated"]
    hardest = min(generated, key=lambda r: r["logprob"])
    browser = open_page("tokens")
    selected = f"#s{hardest['sample']}t{hardest['position']}.on"
    assert find_all(browser, selected) and shown(browser) == hardest["position"]


def test_hovering_shows_everything_about_a_token(open_page, records):
    browser = open_page("tokens")
    token = tokens_of(records, 0)[40]
    hover(browser, "#s0t40")
    text = panel(browser)
    assert "generated, token 41 of" in text
    assert f"id\n{token['id']}" in text
    assert f"bytes\n{bytes(token['bytes']).hex(' ')}" in text
    assert f"rank {token['rank']}" in text
    assert f"entropy\n{token['entropy']:.2f} nats" in text
    assert f"in {token['kept_tokens']} tokens" in text
    big = find(browser, "#panel .score b").text
    assert percentage(big) == pytest.approx(math.exp(token["logprob"]), rel=0.01)


def test_bars_are_the_model_and_what_was_drawn_from(open_page, records):
    browser = open_page("tokens")
    index = next(
        i for i, token in enumerate(tokens_of(records, 0))
        if token["kept_tokens"] and 3 < token["kept_tokens"] < 9
    )  # fmt: skip
    tokens = tokens_of(records, 0)
    hover(browser, f"#s0t{index}")
    items = find_all(browser, "#panel .alternatives li")
    logits = NGram(training_text()).logprobs([t["id"] for t in tokens[:index]])
    drawn = np.exp(logits / SAMPLING["temperature"])
    kept = {one["id"] for one in tokens[index]["top"] if one["kept"]}
    drawn /= drawn[list(kept)].sum()
    for item, one in zip(items, tokens[index]["top"], strict=False):
        assert ("cut" in item.get_attribute("class").split()) == (one["id"] not in kept)
        value = item.find_element(By.CSS_SELECTOR, ".value").text
        if "<" not in value:
            expected = pytest.approx(math.exp(one["logprob"]), rel=0.01, abs=1e-5)
            assert percentage(value) == expected
        if one["id"] in kept:
            title = item.get_attribute("title").split("drawn with")[1]
            assert percentage(title) == pytest.approx(drawn[one["id"]], rel=0.02)
    widths = [item.find_element(By.CSS_SELECTOR, ".first").size["width"] for item in items[:2]]
    logprobs = [one["logprob"] for one in tokens[index]["top"][:2]]
    assert widths[1] / widths[0] == pytest.approx(math.exp(logprobs[1] - logprobs[0]), abs=0.03)


def test_a_chosen_token_beyond_the_top_is_marked_at_its_rank(open_page, records):
    browser = open_page("tokens")
    index, token = next(
        (i, token) for i, token in enumerate(tokens_of(records, 0)) if (token["rank"] or 0) > 10
    )
    hover(browser, f"#s0t{index}")
    items = find_all(browser, "#panel .alternatives li")
    assert len(items) == 11
    chosen = [item for item in items if "chosen" in item.get_attribute("class")]
    assert len(chosen) == 1 and chosen[0].text.startswith(str(token["rank"]))


def test_a_click_keeps_a_token_and_escape_lets_go(open_page):
    browser = open_page("tokens")
    find(browser, "#s0t30").click()
    hover(browser, "#s0t35")
    assert shown(browser) == 30
    press(browser, Keys.ESCAPE)
    assert "Point at a token" in panel(browser)
    hover(browser, "#s0t36")
    assert shown(browser) == 36


def test_arrow_keys_move_from_token_to_token_and_line_to_line(open_page):
    browser = open_page("tokens")
    find(browser, "#s0t30").click()
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert shown(browser) == 31
    bottom = "return document.getElementById('s0t' + arguments[0]).getClientRects()[0].bottom"
    start = browser.execute_script(bottom, 31)
    press(browser, Keys.ARROW_DOWN)
    below = shown(browser)
    assert below > 31 and browser.execute_script(bottom, below) > start
    press(browser, Keys.ARROW_UP)
    assert browser.execute_script(bottom, shown(browser)) == pytest.approx(start, abs=2)
    press(browser, Keys.HOME)
    assert shown(browser) == 0
    assert find(browser, "#say").get_attribute("textContent").startswith(" , no probability")


def test_the_choice_of_colour_recolours_the_text(open_page, records):
    browser = open_page("tokens")
    second = next(t for t in tokens_of(records, 0) if t["rank"] and 11 <= t["rank"] <= 100)
    selector = f"#s0t{second['position']}"
    seen = {}
    for mode in "prsem":
        find(browser, f"[for=by-{mode}]").click()
        seen[mode] = colour(browser, selector)
        keys = [key for key in find_all(browser, ".key") if key.is_displayed()]
        assert [key.get_attribute("class").split()[1] for key in keys] == [f"key-{mode}"]
    find(browser, "[for=by-r]").click()
    swatch = next(s for s in find_all(browser, ".swatches span") if s.text.startswith("11"))
    assert seen["r"] == swatch.value_of_css_property("background-color").replace(
        "rgba", "rgb"
    ).replace(", 1)", ")")
    assert len(set(seen.values())) >= 3


def test_dark_by_preference_and_by_the_switch(open_page):
    browser = open_page("tokens")
    light = colour(browser, "body")
    media(browser, "dark")
    dark = colour(browser, "body")
    assert light != dark
    find(browser, "[for=theme-light]").click()
    assert colour(browser, "body") == light
    media(browser, "light")
    find(browser, "[for=theme-dark]").click()
    assert colour(browser, "body") == dark


def test_the_table_sorts_and_leads_back_to_the_text(open_page, records):
    browser = open_page("tokens")
    open_table(browser)
    tokens = tokens_of(records, 0) + tokens_of(records, 1)
    assert len(find_all(browser, "tbody tr")) == min(len(tokens), 300)
    header = next(b for b in find_all(browser, "th button") if b.text.startswith("surprisal"))
    header.click()
    assert find(browser, "th[aria-sort=descending]").text == "surprisal"
    column = "return [...document.querySelectorAll('tbody tr')].map(r => r.children[5].textContent)"
    values = [float(v) for v in browser.execute_script(column) if v != "–"]
    assert values == sorted(values, reverse=True)
    hardest = max(tokens, key=lambda t: -(t["logprob"] or 0))
    assert values[0] == pytest.approx(-hardest["logprob"], abs=0.01)
    header.click()
    values = [float(v) for v in browser.execute_script(column) if v != "–"]
    assert values == sorted(values)
    assert find(browser, "th[aria-sort=ascending]").text == "surprisal"
    header.click()
    find(browser, "tbody tr a").click()
    eventually(browser, lambda: shown(browser) == hardest["position"])
    assert browser.current_url.endswith(f"#s{hardest['sample']}t{hardest['position']}")


def test_the_strip_leads_to_a_position(open_page, records):
    browser = open_page("tokens")
    strip, count = find(browser, "#s0 .strip"), len(tokens_of(records, 0))
    width = strip.size["width"]
    offset = round(width * (25.5 / count - 0.5))
    ActionChains(browser).move_to_element_with_offset(strip, offset, 0).click().perform()
    assert shown(browser) == 25
    assert strip.get_attribute("aria-valuenow") == "25"
    press(browser, Keys.ARROW_RIGHT)
    assert shown(browser) == 26


def test_shared_characters_point_to_the_token_that_closes_them(open_page):
    browser = open_page("tokens")
    hover(browser, "#s1 .cell > b")
    assert shown(browser) == 2
    assert "part 3 of 3, together" in panel(browser)
    hover(browser, "#s1t1")
    assert shown(browser) == 1 and "bytes\n81" in panel(browser)


def test_an_address_can_name_a_token(open_page, folder):
    browser = open_page("tokens")
    browser.get((folder / "tokens.html").as_uri() + "#s1t7")
    eventually(browser, lambda: filled(browser))
    eventually(browser, lambda: shown(browser) == 7)
    assert "on" in find(browser, "#s1t7").get_attribute("class").split()


def test_records_added_one_by_one_make_the_same_page(open_page, browser, records):
    parts = "return ['samples', 'run'].map(id => document.getElementById(id).innerHTML)"
    metrics(browser, 600)  # without room for the panel no token is shown before one is asked for
    open_page("tokens")
    written = browser.execute_script(parts)
    open_page("empty")
    browser.execute_async_script(
        "const [lines, done] = arguments;"
        "for (const line of lines) tokenPage.addRecord(JSON.parse(line));"
        "requestAnimationFrame(() => requestAnimationFrame(done));",
        [json.dumps(record) for record in records],
    )
    added = browser.execute_script(parts)
    assert added == written
    assert find(browser, ".key-s .blind").get_attribute("textContent") == (
        f"{math.log(records[0]['tokenizer']['vocab_size']):.1f}"
    )


def test_the_distance_of_cached_decoding_is_shown_as_a_measurement(open_page, records):
    browser = open_page("empty")
    numerics = records[0]["numerics"] | {"cached_minus_full_nats": 0.01234}
    run = records[0] | {"numerics": numerics}
    browser.execute_script("tokenPage.addRecord(arguments[0])", run)
    shown = find(browser, "#run").get_attribute("textContent")
    assert shown.endswith("off a full pass by0.0123 nats, on a probe")


def test_an_open_character_shows_its_bytes_until_it_is_closed(open_page):
    run, *tokens = given([b"a", b"\xe4", b"\xb8", b"\x96"])[:5]
    browser = open_page("empty")
    seen = []
    for record in [run, *tokens]:
        browser.execute_script("tokenPage.addRecord(arguments[0])", record)
        seen.append(browser.execute_script(
            "return document.querySelector('.text')?.textContent ?? null"))  # fmt: skip
    assert seen == [None, "a", r"a\xe4", r"a\xe4\xb8", "a世"]
    assert len(find_all(browser, ".cell .t")) == 3


def test_a_click_on_an_alternative_is_an_event_and_a_branch_can_be_cut(open_page, records):
    browser = open_page("one")
    browser.execute_script(
        "tokenPage.branching = true; window.taken = [];"
        "document.addEventListener('alternative', e => window.taken.push(e.detail))"
    )
    find(browser, "#s0t40").click()
    find_all(browser, "#panel button.token")[1].click()
    taken = browser.execute_script("return taken.map(d => [d.sample, d.index, d.alternative.id])")
    token = tokens_of(records, 0)[40]
    assert taken == [[0, 40, token["top"][1]["id"]]]
    browser.execute_script("tokenPage.truncate(0, 40)")
    text = "".join(t["text"] for t in tokens_of(records, 0)[:40])
    assert find(browser, "#s0 .text").get_attribute("textContent") == text
    browser.execute_script("tokenPage.addRecord(arguments[0])", token)
    assert find(browser, "#s0t40").get_attribute("textContent") == token["text"]
    wide = [r for r in given([b"a", b"\xe4", b"\xb8", b"\x96", b"z"]) if r["type"] != "end"]
    browser.execute_script(
        "tokenPage.reset(); arguments[0].forEach(r => tokenPage.addRecord(r))", wide
    )
    browser.execute_script("tokenPage.truncate(0, 3)")
    assert find(browser, ".text").get_attribute("textContent") == r"a\xe4\xb8"
    browser.execute_script("arguments[0].forEach(r => tokenPage.addRecord(r))", wide[4:])
    assert find(browser, ".text").get_attribute("textContent") == "a世z"
    browser.execute_script("tokenPage.reset()")
    assert find(browser, "#samples").get_attribute("innerHTML") == ""


def test_without_scripts_the_text_is_there_and_says_why_it_has_no_colours(open_page, records):
    driver = open_page("tokens")
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.refresh()
        assert "JavaScript, which is switched off" in find(driver, "noscript .note").text
        texts = [plain.get_attribute("textContent") for plain in find_all(driver, ".plain")]
        assert texts == [
            spelled("".join(t["text"] for t in tokens_of(records, sample))) for sample in range(2)
        ]
        assert not find_all(driver, ".t")
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_every_token_has_its_text_id_probability_and_rank(open_page, records):
    browser = open_page("tokens")
    spans = browser.execute_script(
        "return [...document.querySelectorAll('#samples .t')].map(t => [t.id, t.title])"
    )
    tokens = [record for record in records if record["type"] == "token"]
    assert [name for name, _ in spans] == [f"s{t['sample']}t{t['position']}" for t in tokens]
    for (_, tooltip), token in zip(spans, tokens, strict=True):
        # The browser's own tooltip goes from the token under the pointer, if it is one.
        if not tooltip:
            continue
        assert f"id {token['id']} " in tooltip
        if token["logprob"] is None:
            assert "no probability" in tooltip
            continue
        shown = float(re.search(r"([\d.]+) %", tooltip)[1])
        assert shown == pytest.approx(100 * math.exp(token["logprob"]), rel=0.06, abs=0.001)
        assert f"rank {token['rank']}" in tooltip
    texts = browser.execute_script(
        "return [...document.querySelectorAll('#samples .text')].map(t => t.textContent)"
    )
    assert texts == ["".join(t["text"] for t in tokens_of(records, sample)) for sample in range(2)]


SPLIT = [
    b"a", b"\xe4", b"\xb8\x96", b" \xe7", b"\x95\x8c!", "👩‍🔬".encode(), b"\xf0\x9f", b"\x8c\x8d",
]  # fmt: skip


def test_a_live_page_says_of_the_run_what_is_true_of_every_text(browser, folder, records):
    path = folder / "live.html"
    path.write_text(live_page("m", context_length=64, vocab_size=9, run=records[0]), "utf-8")
    browser.get(path.as_uri())
    facts = find(browser, "#run").text
    assert "runs/example" in facts and "2,000" in facts and "sampling" not in facts
    blind = find(browser, ".key-s .blind").get_attribute("textContent")
    assert blind == f"{math.log(9):.1f}", "the legend knows the vocabulary before any answer"


def test_a_diff_page_says_which_facts_differ(open_page):
    before, after = scored(DIFF_TEXT, step=200), scored(DIFF_TEXT)
    browser = open_page("steps", diff_page(before, after, title="t"))
    facts = find(browser, "#run").text
    assert "200 → 2,000" in facts and facts.count("→") == 1
    ends = [end.text for end in find_all(browser, ".key-x span")]
    factor = round(math.exp(3))
    assert ends == [f"÷ {factor}", "same", f"× {factor}"]


def test_a_diff_page_sums_up_before_after_and_the_difference(open_page):
    texts = (DIFF_TEXT, DIFF_TEXT[:20])
    dumps = []
    for doubt in (30.0, 0.5):
        one, other = (scored(text, doubt=doubt) for text in texts)
        dumps.append([*one, *({**record, "sample": 1} for record in other[1:])])
    browser = open_page("sums", diff_page(*dumps, title="t"))
    ends = [end.text for end in find_all(browser, ".end")]
    counted = [[[-t["logprob"] for t in tokens_of(dump, sample)[1:]] for sample in (0, 1)]
               for dump in dumps]  # fmt: skip
    for line, samples in zip(ends, ([0, 1], [0], [1]), strict=True):
        sums = [sum(map(sum, (dump[n] for n in samples))) for dump in counted]
        count = sum(len(counted[0][n]) for n in samples)
        was, now = (math.exp(total / count) for total in sums)
        assert f"{count} tokens predicted" in line
        pairs = [("perplexity", was, now, ""), ("log-probabilities", -sums[0], -sums[1], " nats")]
        for name, old, new, unit in pairs:
            said = f"{name} {old:,.2f} → {new:,.2f} ({new - old:+,.2f}){unit}"
            assert said.replace("-", "−").replace("log−", "log-") in line


def test_records_say_the_rank_of_a_listed_token(open_page):
    records = scored("def f(x)")
    for record in records[2:-1]:
        record["top"] = [
            {**one, "rank": rank} for one, rank in zip(record["top"][:3], (1, 2, 77), strict=True)
        ]
    browser = open_page("ranks", page([records[0] | {"top": 2}, *records[1:]], title="t"))
    hover(browser, "#s0t1")
    assert "77" in [rank.text for rank in find_all(browser, ".alternatives .rank")]


def test_bars_know_the_bias_that_tokens_were_drawn_with(open_page, records):
    token = dict(next(t for t in records if t.get("phase") == "generated"))
    first, second = token["top"][:2]
    token |= {"id": first["id"], "logprob": first["logprob"], "sampling_logprob": -3.0, "rank": 1,
              "sample": 0, "top": [first | {"kept": True}, second | {"kept": True}]}  # fmt: skip
    bias = {str(second["id"]): 2.5}
    run = records[0] | {"sampling": SAMPLING | {"temperature": 0.5, "logit_bias": bias}}
    browser = open_page("bias", page([run, token], title="t"))
    assert f'logit-bias {{"{second["id"]}":2.5}}' in find(browser, "#run").text
    hover(browser, ".t")
    title = find_all(browser, ".alternatives li")[1].get_attribute("title")
    expected = math.exp(-3.0 + (second["logprob"] + 2.5 - first["logprob"]) / 0.5)
    assert percentage(title.split("drawn with")[1]) == pytest.approx(min(expected, 1.0), rel=0.02)


def test_tokens_that_share_a_character_are_bracketed_under_it(open_page):
    browser = open_page("split", page(given(SPLIT), title="t"))
    cells = find_all(browser, "#samples .cell")
    texts = [cell.find_element(By.CSS_SELECTOR, "b").get_attribute("textContent") for cell in cells]
    assert texts == ["世", " 界!", "🌍"]
    assert [len(cell.find_elements(By.CSS_SELECTOR, ".t")) for cell in cells] == [2, 2, 2]


def test_a_character_is_coloured_by_what_its_tokens_cost_together(open_page):
    records = given([b"a", b"\xe4", b"\xb8\x96"])
    tokens = [record for record in records if record["type"] == "token"]
    for record, logprob in zip(tokens, (-1.0, -2.0, -0.5), strict=True):
        record["logprob"] = logprob
    browser = open_page("together", page(records, title="t"))
    level = round((1 - math.exp(-2.5 / 2)) * 24)
    assert f"p{level}" in find(browser, ".cell b").get_attribute("class").split()


def test_tokens_without_text_are_shown_by_their_names(open_page):
    text = "return document.querySelector('#samples .text').textContent"
    browser = open_page("names", page(given([b"a", b""]), title="t"))
    assert browser.execute_script(text) == "a<|endoftext|>"
    unfinished = given([b"a", b"\xf0\x9f"])[:3]
    unfinished[-1] |= {"text": "", "utf8": "open"}
    browser = open_page("unfinished", page(unfinished, title="t"))
    assert browser.execute_script(text) == r"a\xf0\x9f"


def test_the_first_token_has_no_level(open_page):
    browser = open_page("first", page(scored("def f"), title="t"))
    first, second = find(browser, "#s0t0"), find(browser, "#s0t1")
    classes = first.get_attribute("class").replace(" on", "")
    assert classes == "t p- r- s- e- m-"
    assert first.get_attribute("title").endswith("no probability")
    levels = r"t p\d+ r\d+ s\d+ e\d+ m-"
    assert re.fullmatch(levels, second.get_attribute("class").replace(" on", ""))


def test_levels_reach_both_ends_and_never_beyond(open_page):
    browser = open_page("tokens")

    def levels(expression, values):
        return browser.execute_script(f"return arguments[0].map((x) => {expression})", values)

    assert levels("probabilityLevel(x)", [0.0, -1e-9, -1e9]) == [0, 0, 24]
    assert levels("natsLevel(x, 100)", [0.0, math.log(100), 99.0]) == [0, 24, 24]
    assert levels("changeLevel(x)", [-99.0, -3.0, 0.0, 3.0, 99.0]) == [0, 0, 8, 16, 16]
    ranks = [1, 2, 10, 11, 100, 101, 1000, 1001, 50000]
    assert levels("rankLevel(x) / 6", ranks) == [0, 1, 1, 2, 2, 3, 3, 4, 4]


NASTY = [
    "\x00\x01\x1b[31m\x07\x7f", "\u202eevil\u202c \ufeff\u200b\u00ad", "\u2028\u2029\u0085",
    "\U000e0041", "{{7*7}}${7*7}", "]]>&lt;&amp;", "\\x41 \\u0041", "\u200d",
]  # fmt: skip


def test_invisible_and_direction_changing_characters_are_spelled_out(open_page):
    browser = open_page("nasty", page(given([text.encode() for text in NASTY]), title="t"))
    found = find(browser, "#samples .text").get_attribute("textContent")
    assert found == "".join(spelled(text) for text in NASTY)


def test_text_that_looks_like_a_script_does_not_run(open_page):
    attack = [
        b"</script><script>window.hacked=1</script>",
        b"<img src=x onerror=window.hacked=1>",
        b"\" onmouseover=\"window.hacked=1",
        b"</div></section><b>",
    ]  # fmt: skip
    records = given(attack)
    browser = open_page("attack", page(records, title=attack[0].decode()))
    for index in range(len(attack)):
        hover(browser, f"#s0t{index}")
    open_table(browser)
    assert browser.execute_script("return window.hacked ?? null") is None
    assert find(browser, ".text").get_attribute("textContent") == b"".join(attack).decode()
    assert [c.get_attribute("textContent") for c in find_all(browser, "td a")] == [
        piece.decode() for piece in attack
    ]


EVIL = '"><img src=x onerror="window.hacked=1"><h1 class=evil>x</h1>'


def spoiled(value, key=""):
    """A record with markup in every text that a page does not look at for a known word."""
    if isinstance(value, dict):
        return {name: spoiled(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [spoiled(one) for one in value]
    kept = key in ("type", "utf8", "phase") or not isinstance(value, str)
    return value if kept else EVIL


def test_no_field_of_a_record_can_bring_an_element_into_a_page(open_page):
    records = [spoiled(json.loads(json.dumps(one))) for one in given([b"a", b"b", b"c"])]
    records = [one | {"sample": EVIL} if "sample" in one else one for one in records]
    browser = open_page("evil", page(records, title=EVIL))
    assert len(find_all(browser, "#samples .t")) == 3
    assert find_all(browser, ".evil, main img, header img") == []
    assert browser.execute_script("return window.hacked ?? null") is None


def test_policy_stops_a_script_that_slipped_in(open_page, browser):
    open_page("tokens")
    script = "const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
    browser.execute_script(script + "document.body.append(s)")
    assert browser.execute_script("return window.hacked ?? null") is None
    assert "Content Security Policy" in json.dumps(browser.get_log("browser"))


def test_diff_page_shows_both_checkpoints_and_sorts_by_change(open_page):
    before = [r for r in scored(DIFF_TEXT, doubt=30.0) if r["type"] == "token"]
    after = [r for r in scored(DIFF_TEXT, doubt=0.5) if r["type"] == "token"]
    change = [b["logprob"] - a["logprob"] for a, b in zip(before[1:], after[1:], strict=True)]
    browser = open_page("diff")
    classes = {t["position"]: find(browser, f"#s0t{t['position']}").get_attribute("class")
               for t in after[1:]}  # fmt: skip
    for token, nats in zip(after[1:], change, strict=True):
        shown_level = int(re.search(r"x(\d+)", classes[token["position"]])[1])
        assert shown_level == pytest.approx(8 + 8 * np.clip(nats / 3, -1, 1), abs=0.51)
    hover(browser, "#s0t4")
    first, second = re.findall(r"[\d.]+ %", find(browser, "#panel .score b").text)
    assert percentage(first) == pytest.approx(math.exp(before[4]["logprob"]), rel=0.02)
    assert percentage(second) == pytest.approx(math.exp(after[4]["logprob"]), rel=0.02)
    open_table(browser)
    next(b for b in find_all(browser, "th button") if b.text == "change").click()
    column = "return [...document.querySelectorAll('tbody tr')].map(r => r.children[3].textContent)"
    values = [float(v.replace("−", "-")) for v in browser.execute_script(column) if v != "–"]
    assert values == pytest.approx(sorted(change, reverse=True), abs=0.0051)
    colours = {}
    for mode in "xqa":
        find(browser, f"[for=by-{mode}]").click()
        colours[mode] = colour(browser, "#s0t4")
    assert len(set(colours.values())) == 3


def test_attention_page_shows_where_a_head_looks(open_page):
    browser = open_page("attention")
    eventually(browser, lambda: browser.execute_script("return Boolean(window.attentionPage)"))

    def levels():
        classes = [span.get_attribute("class") for span in find_all(browser, "#attended .t")]
        return [int(re.search(r"w(\d+)", one)[1]) for one in classes]

    find_all(browser, "#heads button")[0].click()
    hover(browser, "#t3")
    assert levels() == [0, 0, 24, 0, 0, 0]
    find_all(browser, "#heads button")[1].click()
    assert levels() == [24, 0, 0, 0, 0, 0]
    assert "layer 0, head 1" in panel(browser)
    find(browser, "[for=way-from]").click()
    hover(browser, "#t0")
    assert levels() == [24] * 6
    find(browser, "[for=way-to]").click()
    find(browser, "#layer option[value='1']").click()
    find(browser, "#head option[value=mean]").click()
    hover(browser, "#t3")
    assert levels() == [12, 12, 12, 12, 0, 0]
    find(browser, "#t3").click()
    press(browser, Keys.ARROW_LEFT)
    assert levels() == [round(24 / math.sqrt(3))] * 3 + [0] * 3
    weights = [percentage(item.text) for item in find_all(browser, ".alternatives li")]
    assert weights == pytest.approx([1 / 3] * 3, abs=0.004)


# Paragraphs of both directions, letters that join, marks above and below, joined emoji. (Lam and
# alef are not neighbours here: a browser makes one glyph of the two only within an element.)
SCRIPTS = {
    "Hebrew": "שלום עולם, Python 3.11 טוב!",
    "Hebrew in English": "abc שלום עולם def.",
    "Arabic": "مرحبا يا صديقي abc 123.",
    "Persian": "می\u200cخواهم کتاب\u200cها",
    "Thai": "สวัสดีชาวโลก ที่นี่",
    "Hindi": "नमस्ते दुनिया, क्षत्रिय",
    "Chinese": "道可道\uff0c非常道。",
    "emoji": "👩\u200d🔬 👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 🇨🇭 👍🏽 e\u0301",
}
# How tokens cut a text: where the bytes of each begin.
CUTS = {
    "bytes": lambda data: range(len(data)),
    "characters": lambda data: [i for i, byte in enumerate(data) if byte & 0xC0 != 0x80],
    "a space and a byte": lambda data: [
        i for i in range(len(data)) if i == 0 or data[i - 1 : i] != b" "
    ],
    "anywhere": lambda data: range(0, len(data), 3),
    "pairs across characters": lambda data: [0, *range(1, len(data), 2)],
}
PLACES = """
const [holder] = arguments, walker = document.createTreeWalker(holder, NodeFilter.SHOW_TEXT);
const box = holder.getBoundingClientRect(), places = [];
for (let node; (node = walker.nextNode());) {
  for (let i = 0; i < node.data.length; i++) {
    const range = new Range();
    range.setStart(node, i);
    range.setEnd(node, i + 1);
    const place = range.getBoundingClientRect();
    places.push([node.data.charCodeAt(i), place.left - box.left, place.right - box.left]);
  }
}
return places;
"""
PLAIN = """
const [text, like] = arguments, plain = document.createElement("div");
plain.className = "text";
plain.textContent = text;
like.after(plain);
return plain;
"""


@pytest.mark.parametrize("cut", CUTS)
def test_tokens_stand_where_their_text_stands_by_itself(open_page, cut):
    records = []
    for sample, script in enumerate(SCRIPTS.values()):
        data = script.encode()
        starts = [*CUTS[cut](data), len(data)]
        pieces = [data[a:b] for a, b in itertools.pairwise(starts)]
        run, *of_text = given(pieces)
        records += [run] * (not sample) + [record | {"sample": sample} for record in of_text]
    browser = open_page("scripts", page(records, title="t"))
    texts = find_all(browser, "#samples .text")
    for text, script in zip(texts, SCRIPTS.values(), strict=True):
        # The oracle: how the browser itself sets the text, without an element in it.
        plain = browser.execute_script(PLAIN, script, text)
        places, expected = (browser.execute_script(PLACES, holder) for holder in (text, plain))
        assert [place[0] for place in places] == [place[0] for place in expected]
        assert np.allclose([p[1:] for p in places], [p[1:] for p in expected], atol=2), script


def test_marks_and_joined_emoji_are_one_character_of_several_tokens(open_page):
    pieces = ["e", "\u0301", "x", "\U0001f469", "\u200d", "\U0001f52c", "\U0001f1e8", "\U0001f1ed"]
    records = given([piece.encode() for piece in pieces])
    browser = open_page("marks", page(records, title="t"))

    def cells():
        return [
            len(cell.find_elements(By.CSS_SELECTOR, ".t")) for cell in find_all(browser, ".cell")
        ]

    assert cells() == [2, 3, 2]
    hover(browser, "#s0t3")
    assert "part 1 of 3" in panel(browser)
    browser.execute_script("tokenPage.truncate(0, 5)")
    assert cells() == [2, 2]
    browser.execute_script("arguments[0].forEach(r => tokenPage.addRecord(r))", records[6:-1])
    assert cells() == [2, 3, 2]
    endless = given([b"a", *["\u0301".encode()] * 300])
    browser = open_page("endless", page(endless, title="t"))
    assert max(cells()) <= 32 and len(find_all(browser, ".t")) == 301
    assert find(browser, ".text").get_attribute("textContent") == "a" + "\u0301" * 300
    alone = given([b"word", "\u200d".encode(), b"x" * 40, "\u200d".encode(), b"b"])
    browser = open_page("joiners", page(alone, title="t"))
    assert cells() == [2], "a long token stays by itself"
    before = "return getComputedStyle(arguments[0], '::before').content"
    assert [browser.execute_script(before, mark) for mark in find_all(browser, ".text .zw")] == [
        '"zwj"'
    ] * 2


def test_numbers_are_written_as_a_person_would(open_page):
    records = given([b"a", b"b"])[:2]
    records[1] |= {"logprob": -0.0, "entropy": -0.0, "rank": 1, "top": records[1]["top"][:1]}
    end = {"type": "end", "sample": 0, "finish": "length", "tokens": 1, "sum_logprob": -0.0,
           "perplexity": 1.0, "bits_per_byte": -0.0, "text": "a"}  # fmt: skip
    browser = open_page("zeros", page([*records, end], title="t"))
    hover(browser, ".t")
    said = find(browser, "main").text
    assert "-0" not in said and "−0" not in said and "surprisal\n0.00 nats" in said
    assert "1 token predicted" in said.replace("\n", " ") and "1 other has" in said


@pytest.mark.parametrize("name", ["tokens", "diff", "attention"])
def test_paper_is_light_and_has_the_colours_and_their_legend(open_page, browser, name):
    open_page(name)
    level = {"tokens": ".p24", "diff": ".x0, .x16", "attention": "#attended .w12"}[name]
    expected, paper = colour(browser, level), colour(browser, "body")
    find(browser, "[for=theme-dark]").click()
    assert colour(browser, "body") != paper
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert (colour(browser, level), colour(browser, "body")) == (expected, paper)
        printed = "return getComputedStyle(document.querySelector('.t')).printColorAdjust"
        assert browser.execute_script(printed) == "exact"
        assert find_all(browser, ".key > div")[0].is_displayed()
        assert not find(browser, ".choice").is_displayed()
        assert not find(browser, "#panel").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_characters_of_several_tokens_are_characters_on_the_attention_page(open_page):
    pieces = [b"a", b" \xd7", b"\xa9", b"\xe4", b"\xb8\x96", b"z"]
    tokens = tokens_of(given(pieces), 0)
    browser = open_page("shared", attention_page(attention_weights(), tokens, title="t"))
    text = find(browser, "#attended")
    assert text.get_attribute("textContent") == "a ש世z"
    assert [len(c.find_elements(By.CSS_SELECTOR, ".t")) for c in find_all(browser, ".cell")] == [
        2,
        2,
    ]
    find_all(browser, "#heads button")[0].click()  # each looks at the token before
    hover(browser, "#t4")
    assert panel(browser).startswith("世 2/2")
    assert [item.text for item in find_all(browser, ".alternatives .token")] == ["世 1/2"]
    assert find_all(browser, ".cell > b")[1].get_attribute("class") == "w24"
    hover(browser, ".cell > b")
    assert panel(browser).startswith(" ש 2/2")
    shown = find(browser, ".cell").get_attribute("class")
    assert shown == "cell on"


def test_the_panel_of_attention_opens_on_a_phone_when_asked_and_closes(open_page, browser):
    metrics(browser, 390)
    open_page("attention")
    assert "Point at a token" in panel(browser)
    for close in (
        lambda: find(browser, "#panel .close").click(),
        lambda: press(browser, Keys.ESCAPE),
        lambda: find(browser, "#t3").click(),
    ):
        find(browser, "#t3").click()
        assert panel(browser).startswith("d")
        close()
        assert "Point at a token" in panel(browser)
        find(browser, "[for=way-from]").click()
        assert "Point at a token" in panel(browser), "a choice does not open it"


@pytest.mark.parametrize("name", ["tokens", "diff", "attention"])
def test_pages_fit_a_phone(open_page, browser, name):
    metrics(browser, 390)
    open_page(name)
    width = "return document.documentElement.scrollWidth"
    assert browser.execute_script(width) <= 390
    if name != "attention":
        hover(browser, "#s0t8")  # the panel would come between the pointer and the text
        assert "Point at a token" in panel(browser)
        find(browser, "#s0t8").click()
        box = find(browser, "#panel").rect
        assert browser.execute_script(width) <= 390 and box["width"] >= 380
        find(browser, "#panel .close").click()
        assert "Point at a token" in panel(browser)


def test_everything_can_be_reached_by_the_keyboard(open_page):
    browser = open_page("tokens")
    reached = []
    for _ in range(12):
        press(browser, Keys.TAB)
        active = browser.switch_to.active_element
        reached.append(
            active.get_attribute("id") or active.get_attribute("class") or active.tag_name
        )
    assert reached[:3] == ["by-p", "spaces-on", "theme-auto"]
    assert {"strip", "text", "summary"} <= set(reached)
    find(browser, "#s0 .text").send_keys(Keys.ARROW_RIGHT)
    assert shown(browser) >= 0
