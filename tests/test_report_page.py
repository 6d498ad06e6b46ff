"""The report in a browser: what a person reads, points at, switches and clicks.

Needs Chromium, its driver and selenium; skipped where one of them is missing.
"""

import base64
import json
import math
import re
import urllib.error
import urllib.request

import pytest

from llm.__main__ import main
from llm.pages.report import gather, report_page
from llm.pages.report_server import start_server
from llm.run.directory import RunDirectory

pytest.importorskip("selenium")
import test_browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from test_browser import eventually, filled, find, find_all, metrics, press

browser = test_browser.browser
pytestmark = test_browser.pytestmark

HOSTILE = '<img src=x onerror=alert(1)> "名字" 👩‍🔬 \u202e$x$'


@pytest.fixture
def run(copy):
    """A run that was resumed, skipped an update and has a name that would do harm as markup."""
    path = copy / "run"
    lines = (path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[2]) | {"loss": None, "finite": False}
    lines[2] = json.dumps(row)
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind":"tra')
    record = json.loads((path / "run.json").read_text())
    record["starts"].append(record["starts"][0] | {"from_step": 5, "ended": HOSTILE})
    (path / "run.json").write_text(json.dumps(record))
    target = copy / HOSTILE.replace("/", "")
    path.rename(target)
    return RunDirectory(target)


@pytest.fixture
def opened(browser, run, tmp_path):
    """The page of the run; afterwards nothing may have been complained about or loaded."""
    page = tmp_path / "report.html"
    page.write_text(report_page(gather([run])), "utf-8")
    metrics(browser, 1300)
    browser.get("about:blank")
    browser.get(page.as_uri())
    eventually(browser, lambda: filled(browser))
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def rows_of(run, kind):
    lines = run.metrics.read_text().split("\n")[:-1]
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def legend(browser, chart):
    """label -> value as they are shown under a chart."""
    script = """return [...document.querySelectorAll(arguments[0] + ' .u-series')].map((row) =>
      ['.u-label', '.u-value'].map((part) => row.querySelector(part).textContent))"""
    return dict(browser.execute_script(script, f"#chart-{chart} .u-legend"))


def hover_step(browser, chart, x):
    """Point at a place of a chart by its number on the axis."""
    script = """const plot = reportPage.curves.plots.find((one) =>
      one.root.parentElement.id === 'chart-' + arguments[0]);
      return plot.valToPos(arguments[1], 'x') - plot.over.clientWidth / 2;"""
    offset = browser.execute_script(script, chart, x)
    over = find(browser, f"#chart-{chart} .u-over")
    chain = ActionChains(browser).move_to_element(over)
    chain.move_to_element_with_offset(over, round(offset), 5).perform()


def test_the_pointer_reads_the_numbers_of_the_metrics_on_every_axis(opened, run):
    assert opened.execute_script("return scrollY") == 0
    find(opened, "[for=curve-raw]").click()
    trained, evaluated = rows_of(run, "train"), rows_of(run, "eval")
    row = next(row for row in trained if row["step"] == evaluated[0]["step"])
    flops = row["tokens"] * run.read_provenance()["model"]["flops_per_token"]
    seconds = math.fsum(one["step_seconds"] for one in trained[: trained.index(row) + 1])
    for name, label, x in [
        ("step", "steps", row["step"]), ("tokens", "tokens", row["tokens"]),
        ("seconds", "time", seconds), ("flops", "FLOPs", flops),
    ]:  # fmt: skip
        find(opened, f"[for=against-{name}]").click()
        hover_step(opened, "loss", x)
        shown = legend(opened, "loss")
        assert float(shown["training"]) == pytest.approx(row["loss"], rel=1e-5)
        assert float(shown["validation"]) == pytest.approx(evaluated[0]["loss"], rel=1e-5)
        assert label in shown and shown[label] != "–"
        norm = float(legend(opened, "grad_norm")["training"])
        assert norm == pytest.approx(row["grad_norm"], rel=1e-5)
    assert "1 restart (dashed lines), from step 5." in find(opened, "#marked").text
    assert "1 skipped update (triangles), at step 3." in find(opened, "#marked").text
    assert find(opened, "h1").text.startswith("<img src=x") and not find_all(opened, "h1 img")


def test_a_logarithmic_axis_and_the_keyboard_read_the_same_numbers(opened, run):
    find(opened, "[for=curve-raw]").click()
    find(opened, "[for=scale-both]").click()
    opened.execute_script("document.getElementById('chart-loss').focus()")
    press(opened, Keys.HOME, Keys.ARROW_RIGHT)
    row = rows_of(run, "train")[1]
    assert float(legend(opened, "loss")["training"]) == pytest.approx(row["loss"], rel=1e-5)
    assert find(opened, "#say").get_attribute("textContent").startswith("Loss: steps")
    ActionChains(opened).key_down(Keys.ALT).send_keys(Keys.END).key_up(Keys.ALT).perform()
    assert float(legend(opened, "loss")["training"]) == pytest.approx(row["loss"], rel=1e-5)
    shown = "const { min, max } = reportPage.curves.plots[1].scales.x; return [min, max]"
    whole = opened.execute_script(shown)
    press(opened, "+", "+")  # to a quarter around the second step
    eventually(opened, lambda: opened.execute_script(shown) == [2 - 1 / 4, 2 + (whole[1] - 2) / 4])
    assert find(opened, "#unzoom").is_displayed()
    press(opened, "-", "-")
    eventually(opened, lambda: opened.execute_script(shown) == whole)
    assert whole == [1, rows_of(run, "train")[-1]["step"]]
    ratio = """const plot = reportPage.curves.plots[0], at = (x) => plot.valToPos(x, 'x');
      return (at(4) - at(2)) / (at(8) - at(4));"""
    assert opened.execute_script(ratio) == pytest.approx(1, rel=1e-3)


def test_on_paper_the_curves_are_light_and_as_wide_as_their_column(opened):
    """A page in the dark theme is printed: what was drawn for the window is drawn again."""
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})
    paper = {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
    try:
        widths, ink = opened.execute_script("""
            const canvases = [...document.querySelectorAll(".chart canvas")], first = canvases[0];
            const { data } = first.getContext("2d").getImageData(0, 0, first.width, first.height);
            let brightest = 0;
            for (let i = 0; i < data.length; i += 4) {
                const [red, green, blue, opaque] = data.slice(i, i + 4);
                if (opaque === 255) brightest = Math.max(brightest, red + green + blue);
            }
            return [canvases.map((one) => [one.clientWidth, one.closest(".chart").clientWidth]),
                    brightest];""")
        assert len(widths) > 3 and all(canvas == column for canvas, column in widths)
        line = 3 * 0xDF  # the brightest of the light theme; the dark one has none above its ink
        assert line - 20 <= ink <= line
        assert not [one for one in find_all(opened, ".u-value") if one.is_displayed()]
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_a_pdf_of_a_page_in_the_dark_theme_has_curves_of_ink(opened):
    """A curve that is drawn for the paper is lines in the PDF; one left from the window, which is
    dark, would be a picture of it."""
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": dark})
    try:
        pdf = base64.b64decode(opened.execute_cdp_cmd("Page.printToPDF", {})["data"])
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    pictures = re.findall(rb"/Subtype /Image\s+/Width (\d+)", pdf)
    assert pdf.startswith(b"%PDF") and not [width for width in pictures if int(width) > 100]


def test_the_legend_has_the_colours_of_the_curves_in_the_theme_of_the_moment(opened):
    marker = "#chart-loss .u-series:last-child .u-marker"
    shown = (
        f"return [getComputedStyle(document.querySelector('{marker}')).borderColor,colour('run1')]"
    )
    for theme in ("light", "dark"):
        find(opened, f"[for=theme-{theme}]").click()
        border, ink = opened.execute_script(shown)
        assert border == ink == {"light": "rgb(196, 89, 10)", "dark": "rgb(242, 161, 60)"}[theme]


def test_numbers_of_any_size_are_short(opened):
    spelled = "return [1e15, 2.5e18, 6e24, 999e12].map(compact)"
    assert opened.execute_script(spelled) == ["1e15", "2.5e18", "6e24", "999T"]


def test_the_curve_of_a_token_is_as_wide_as_its_place(opened):
    for width in (1300, 700, 390):
        metrics(opened, width)
        script = """const box = document.querySelector('.growth');
          return box.clientWidth === box.firstElementChild.clientWidth
            && document.documentElement.scrollWidth <= innerWidth"""
        eventually(opened, lambda s=script: opened.execute_script(s))


def test_marks_of_memory_are_whole_in_their_units(opened):
    """On a scale of its own: how much memory this process came to have is not the page's doing."""
    plot = """const plot = reportPage.curves.plots.find((one) =>
      one.root.parentElement.id === 'chart-memory_bytes');"""
    opened.execute_script(f"{plot} plot.setScale('y', {{min: 0, max: 3 * 2 ** 30}})")
    marks = [mark for mark in opened.execute_script(f"{plot} return plot.axes[1]._values") if mark]
    assert len(marks) > 1 and all(len(mark.split()[0]) <= 4 for mark in marks), marks


def test_a_click_follows_a_token_over_the_steps(opened, run):
    rows = [json.loads(line) for line in run.probes.read_text().splitlines()]
    rows = [row for row in rows if row["name"] == "Held-out text 1"]
    place = 5
    find(opened, f"#l0t{place}").click()
    shown = [row.text.split() for row in find_all(opened, "#token tbody tr")]
    assert [int(cells[0]) for cells in shown] == [row["step"] for row in rows]
    for cells, row in zip(shown, rows, strict=True):
        logprob, rank, *_ = row["said"][place]
        assert float(cells[1]) == pytest.approx(100 * math.exp(logprob), rel=0.01)
        assert int(cells[3]) == rank
    press(opened, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert find(opened, "#lines .here").get_attribute("id") == f"l1t{place + 1}"
    before = find(opened, "#l0t5").value_of_css_property("background-color")
    find(opened, "[for=by-r]").click()
    assert find(opened, "#l0t5").value_of_css_property("background-color") != before


def test_the_live_page_grows_and_answers_to_this_machine_alone(browser, run):
    server = start_server([run], "127.0.0.1", 0)
    browser.get(server.url)
    eventually(browser, lambda: filled(browser))
    newest = "return reportPage.report.runs[0].train.step.at(-1)"
    hidden = "return reportPage.curves.plots[0].series.map(({ show }) => show)"
    zoomed = "const { min, max } = reportPage.curves.plots[1].scales.x; return [min, max]"
    browser.execute_script("""reportPage.curves.plots[0].setScale('x', {min: 2, max: 6});
        document.querySelectorAll('#chart-loss .u-legend th')[2].focus()""")
    press(browser, Keys.SPACE)
    eventually(browser, lambda: browser.execute_script(zoomed) == [2, 6])
    place = "return document.getElementById('lines').getBoundingClientRect().top"
    browser.execute_script("document.getElementById('learnt').scrollIntoView()")
    before = browser.execute_script(place)
    row = rows_of(run, "train")[-1] | {"step": 999, "loss": 0.125}
    content = run.metrics.read_text().rpartition("\n")[0] + "\n" + json.dumps(row) + "\n"
    run.metrics.write_text(content)
    eventually(browser, lambda: browser.execute_script(newest) == 999)
    assert browser.execute_script(zoomed) == [2, 6]
    assert browser.execute_script(hidden) == [True, True, False, True]
    assert browser.execute_script(place) == pytest.approx(before, abs=2)
    assert browser.get_log("browser") == []
    request = urllib.request.Request(f"{server.url}/data.json", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)
    browser.get(server.url)
    eventually(browser, lambda: filled(browser))
    (run.path / "config.toml").write_text("[")
    run.metrics.touch()
    state = lambda: find(browser, "#state").text  # noqa: E731
    eventually(browser, lambda: "config.toml" in state())
    server.shutdown()
    server.server_close()
    eventually(browser, lambda: "the server does not answer" in state())
    browser.get("about:blank")
    browser.get_log("browser")


def test_a_text_at_each_checkpoint_is_a_page(browser, unbroken, tmp_path):
    page = tmp_path / "history.html"
    words = ["--text", "the teeth", "--html", str(page)]
    assert main(["history", str(unbroken / "run"), *words]) == 0
    browser.get(page.as_uri())
    eventually(browser, lambda: filled(browser))
    assert len(find_all(browser, "#lines > span")) == 2 * len(
        list((unbroken / "run" / "checkpoints").iterdir())
    )
    assert not find(browser, "#curves").is_displayed() and browser.get_log("browser") == []
