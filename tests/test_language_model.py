"""`llm.load` and what it gives: the commands' numbers as Python objects, on any number of devices.

One tiny run is written to disk without training it. The oracles are the commands' own files,
compared byte for byte, and a forward pass of the model with the log-softmax in float64.
"""

import dataclasses
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import llm
import llm.commands.sample
import llm.commands.score
import llm.commands.shared
import llm.run.open
from llm.api import results
from llm.config import Config, SamplingConfig
from llm.errors import NonFiniteError, UsageError
from llm.inference import samples
from llm.inference.decode import Decoder, Request, exhaust
from llm.inference.programs import decode_chunk
from llm.inference.records import Sampling, read_records
from llm.inference.score import _describe_batch
from llm.model.gpt import ModelSpec, bind, initialise
from llm.model.sharding import check_divisible
from llm.model_config import ModelConfig
from llm.pages.attention import attention_weights
from llm.run.checkpoint import Checkpoints
from llm.run.directory import RunDirectory
from llm.run.receipt import make_receipt, receipt_logprobs
from llm.run.setup import predicting_mesh
from llm.text.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 64
MODEL = ModelConfig(n_layer=1, n_head=4, d_model=128, context_length=CONTEXT)
SAMPLE = SamplingConfig(
    prompt="It was", max_new_tokens=12, temperature=0.9, top_k=50, seed=3, num_samples=2
)
STEPS = (5, 7)
TEXTS = [
    "It was a bright cold day in April, and the clocks were striking. " * 2,
    "h\u00e9!",
    "z",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs/mine, which holds two steps."""
    root = tmp_path_factory.mktemp("api")
    run, tokenizer = RunDirectory(root / "runs" / "mine"), ByteTokenizer()
    spec = ModelSpec(MODEL, tokenizer.vocab_size)
    tokenizer.save(run.tokenizer)
    checkpoints = Checkpoints(run.checkpoints, keep=len(STEPS))
    checkpoints.clean()
    tokens = np.arange(34, dtype=np.int32).reshape(2, 17)
    for step in STEPS:
        params = jax.jit(initialise, static_argnums=0)(spec, jax.random.key(step))
        params = {name: 4.0 * w if w.ndim > 1 else w for name, w in params.items()}
        logprobs = receipt_logprobs(spec, params, tokens)
        checkpoints.save(
            step,
            {"params": params, "training": {"step": jax.numpy.int32(step)}},
            lambda logprobs=logprobs: make_receipt(tokens, logprobs, tokenizer.sha256),
        )
    checkpoints.close()
    run.write_config(Config(model=MODEL, sample=SAMPLE))
    return root


@pytest.fixture(scope="module")
def lm(folder):
    return llm.load(folder / "runs/mine")


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Runs `sample` or `score` on the run; gives the files it was asked for."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    monkeypatch.setattr(llm.commands.shared, "prepare_process", lambda: None)

    def run(module, *arguments):
        assert module.main(["runs/mine", *map(str, arguments)]) == 0
        return capsys.readouterr()

    return run


def forward(lm, text):
    """log P of every token at every place, float64 [T, V], by one pass over the whole text."""
    ids = lm.tokenizer.encode(text)
    logits = jax.jit(lambda p, t: bind(lm.spec, p)(t))(lm.params, ids[None])[0]
    logits = np.asarray(logits, np.float64)
    return ids, logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_import_llm_is_light_and_load_is_lazy():
    code = (
        "import sys, llm; heavy = {'jax', 'numpy', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy; llm.errors.UsageError; llm.load"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_load_takes_the_newest_step_and_says_what_it_is(lm, folder):
    assert (lm.run, lm.step) == ("mine", 7)
    shown = repr(lm)
    for fact in ("'mine'", "step=7", f"{lm.parameters:,}", "context 64", "257", "bytes", "1 x cpu"):
        assert fact in shown, fact
    assert llm.load(folder / "runs/mine", step=5).step == 5


def test_parameters_are_counted_without_the_padding_of_the_vocabulary(lm):
    """257 tokens are padded to a multiple; nobody trains what no token has."""
    weights = lm.params
    tables = [name for name in ("embed.weight", "head.weight") if name in weights]
    assert len(weights["embed.weight"]) > 257
    padding = sum(weights[name].size - 257 * MODEL.d_model for name in tables)
    assert lm.parameters == sum(weight.size for weight in weights.values()) - padding


def test_a_score_is_what_one_forward_pass_says(lm):
    text = TEXTS[0][:CONTEXT]
    s = lm.score(text)
    ids, logprobs = forward(lm, text)
    expected = logprobs[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_array_equal(s.ids, ids)
    assert s.logprobs.dtype == np.float32 and np.isnan(s.logprobs[0])
    np.testing.assert_allclose(s.logprobs[1:], expected, atol=1e-4)
    assert s.total_nats == pytest.approx(-expected.sum(), rel=1e-5)
    assert s.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-5)
    assert s.bits_per_byte == pytest.approx(-expected.mean() / np.log(2), rel=1e-5)
    assert s.text == text and "".join(token.text for token in s.tokens) == text
    for t, token in enumerate(s.tokens[1:], start=1):
        row = logprobs[t - 1]
        assert token.rank == 1 + (row > row[ids[t]]).sum()
        assert token.entropy == pytest.approx(-(np.exp(row) * row).sum(), abs=1e-4)
        assert token.top[0].id == row.argmax() and [a.rank for a in token.top] == [*range(1, 11)]
        assert token.probability == pytest.approx(np.exp(row[ids[t]]), rel=1e-3)
        assert (token.bytes, token.phase, token.sampling_logprob) == (
            bytes([ids[t]]),
            "prompt",
            None,
        )


def test_the_first_token_has_no_numbers_and_texts_of_none_or_one_token_have_no_sums(lm):
    empty, one = lm.score(["", "z"])
    assert (empty.tokens, empty.total_nats, empty.perplexity) == ((), 0.0, None)
    assert (one.total_nats, one.perplexity, one.bits_per_byte) == (0.0, None, None)
    (first,) = one.tokens
    assert (first.logprob, first.rank, first.entropy, first.probability) == (None,) * 4
    assert first.top == () and np.isnan(one.logprobs).all() and empty.logprobs.shape == (0,)


def test_scores_write_what_the_command_writes(lm, command, tmp_path):
    probs, page = tmp_path / "command.jsonl", tmp_path / "command.html"
    flags = ("--top", 3, "--watch", 5, 97, "--stride", 8, "--probs", probs, "--html", page)
    command(llm.commands.score, "--text", *TEXTS, *flags)
    scores = lm.score(TEXTS, top=3, watch=np.array([5, 97]), stride=8)
    scores.write(tmp_path / "api.jsonl")
    scores.write_html(tmp_path / "api.html")
    assert (tmp_path / "api.jsonl").read_bytes() == probs.read_bytes()
    assert (tmp_path / "api.html").read_bytes() == page.read_bytes()
    assert scores.records() == read_records(probs) and scores.html() == page.read_text()


def test_samples_write_what_the_command_writes(lm, command, tmp_path):
    probs, page = tmp_path / "command.jsonl", tmp_path / "command.html"
    settings = {
        "max_new_tokens": 9, "temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.01,
        "seed": 11, "num_samples": 2, "top": 4, "watch": 7,
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    files = ("--probs", probs, "--html", page)
    prompts, stop = ["def ", ""], ["e", "\u00e9"]
    command(llm.commands.sample, "--prompt", *prompts, "--stop", *stop, *flags, *files)
    drawn = lm.generate(prompts, **{**settings, "watch": [7], "stop": stop})
    assert len(drawn) == 4
    drawn.write(tmp_path / "api.jsonl")
    assert (tmp_path / "api.jsonl").read_bytes() == probs.read_bytes()
    assert drawn.html() == page.read_text()


def test_what_is_not_given_is_as_the_runs_section_has_it(lm, command, tmp_path):
    command(llm.commands.sample, "--num-samples", 1, "--probs", tmp_path / "command.jsonl")
    g = lm.generate()  # one sample, whatever sample.num_samples says
    assert g.records() == read_records(tmp_path / "command.jsonl")
    assert g.text.startswith(SAMPLE.prompt) and len(g.new_tokens) == SAMPLE.max_new_tokens


@pytest.mark.thorough
def test_in_bfloat16_the_record_carries_the_measured_distance(lm, command, monkeypatch, tmp_path):
    spec = dataclasses.replace(lm.spec, compute_dtype="bfloat16")
    half = dataclasses.replace(lm, spec=spec)
    monkeypatch.setattr(llm.run.open, "open_model", lambda run, step=None: half)
    command(llm.commands.sample, "--num-samples", 1, "--probs", tmp_path / "command.jsonl")
    written = read_records(tmp_path / "command.jsonl")
    assert written[0]["numerics"]["cached_minus_full_nats"] >= 0.0
    assert half.generate().records() == written


def test_a_generation_is_its_prompt_and_what_was_drawn(lm):
    g = lm.generate("def ", max_new_tokens=6, seed=1)
    assert g.text == "def " + g.new_text and g.finish == "length"
    assert [token.phase for token in g.tokens] == ["prompt"] * 4 + ["generated"] * 6
    assert g.new_tokens == g.tokens[4:] and len(g.logprobs) == len(g.ids) == 10
    assert g.total_nats == pytest.approx(-sum(token.logprob for token in g.new_tokens))
    again = lm.score(bytes(g.ids.tolist()).decode("utf-8", "surrogateescape"))
    np.testing.assert_allclose(g.logprobs, again.logprobs, atol=1e-4)
    assert lm.generate("def ", max_new_tokens=6, seed=1).records() == g.records()
    assert lm.generate("def ", max_new_tokens=6, seed=2).text != g.text
    greedy = lm.generate("def ", max_new_tokens=6, greedy=True)
    assert greedy.ids.tolist() == lm.generate("def ", max_new_tokens=6, temperature=0).ids.tolist()
    assert all(token.rank == 1 and token.sampling_logprob == 0.0 for token in greedy.new_tokens)
    full = lm.generate("def ", max_new_tokens=100)
    assert full.finish in ("context", "end_of_text") and len(full.ids) <= CONTEXT
    prompt_only = lm.generate("def ", max_new_tokens=0)
    assert (prompt_only.new_text, prompt_only.total_nats) == ("", 0.0)


def test_typed_tokens_are_their_records(lm):
    g = lm.generate("def ", max_new_tokens=6, top_k=3)
    records = [record for record in g.records() if record["type"] == "token"]
    for token, record in zip(g.tokens, records, strict=True):
        entries = record.pop("top")
        assert [entry["rank"] for entry in entries] == [*range(1, len(entries) + 1)]
        for typed, line in [(token, record), *zip(token.top, entries, strict=True)]:
            assert list(typed.bytes) == line.pop("bytes") and isinstance(typed.bytes, bytes)
            values = {name: getattr(typed, name) for name in line if name != "type"}
            assert values == {name: line[name] for name in values}
    assert {entry.kept for token in g.new_tokens for entry in token.top} == {True, False}


def test_a_stop_string_is_cut_and_its_tokens_are_there(lm):
    text = lm.generate("def ", max_new_tokens=12, greedy=True).new_text
    stop = text[3:6]
    g = lm.generate("def ", max_new_tokens=12, greedy=True, stop=stop)
    assert g.finish == "stop" and g.new_text == text[: text.index(stop)]
    spelled = b"".join(token.bytes for token in g.new_tokens).decode("utf-8", "replace")
    assert stop in spelled and len(spelled) > len(g.new_text)


def test_stream_gives_the_tokens_of_generate_one_by_one(lm):
    whole = lm.generate("def ", max_new_tokens=8, seed=4)
    seen = []

    def consume():
        stream = lm.stream("def ", max_new_tokens=8, seed=4)
        while True:
            try:
                seen.append(next(stream))
            except StopIteration as end:
                return end.value

    result = consume()
    assert tuple(seen) == whole.new_tokens
    assert result.records() == whole.records()


def test_lists_give_lists_in_order_and_one_text_gives_one_result(lm, monkeypatch):
    scores = lm.score(text for text in ("ab", "cde"))
    assert [s.text for s in scores] == ["ab", "cde"] and isinstance(scores, list)
    assert lm.score([]) == [] and lm.generate([]) == []
    few = {"max_new_tokens": 2, "watch": [7]}
    prompts = [g.text[0] for g in lm.generate(["a", "b"], num_samples=2, **few)]
    assert prompts == ["a", "a", "b", "b"]
    assert len(lm.generate("a", num_samples=1, max_new_tokens=2)) == 1
    monkeypatch.setattr(samples, "MAX_ROWS", 4)  # so that eight are two batches
    many = lm.generate(list("abcdefgh"), **few)
    assert [g.text[0] for g in many] == list("abcdefgh")


def test_results_of_one_kind_are_one_file_and_others_are_refused(lm):
    ab, cd = lm.score("ab"), lm.score("cd")
    both = results.Results([cd, ab])
    assert [r["sample"] for r in both.records() if r["type"] == "end"] == [0, 1]
    assert results.Results().records() == []
    with pytest.raises(UsageError, match="one run record"):
        results.Results([ab, lm.generate("a", max_new_tokens=1)]).records()


def test_a_table_has_the_records_row_by_row(lm, monkeypatch):
    pandas = pytest.importorskip("pandas")
    scores = lm.score(["h\u00e9!", "ab"], top=2)
    frame = scores.to_pandas()
    tokens = [record for record in scores.records() if record["type"] == "token"]
    assert list(frame.columns) == list(tokens[0])[1:] and len(frame) == len(tokens) == 6
    assert frame["bytes"].tolist() == [b"h", b"\xc3", b"\xa9", b"!", b"a", b"b"]
    assert frame["rank"].isna().tolist() == [True, False, False, False, True, False]
    present = frame["logprob"].dropna().tolist()
    assert present == [token["logprob"] for token in tokens if token["logprob"] is not None]
    assert frame["rank"].dropna().tolist() == [t["rank"] for t in tokens if t["rank"] is not None]
    assert pandas.api.types.is_integer_dtype(frame["rank"].dtype)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        scores.to_pandas()


def test_distribution_and_attention_are_the_models_own(lm):
    text = "the clocks were"
    ids, expected = forward(lm, text)
    logprobs = lm.distribution(text)
    assert logprobs.dtype == np.float32
    np.testing.assert_allclose(logprobs, expected[:-1], atol=1e-4)
    weights = lm.attention(text)
    T = len(ids)
    assert weights.shape == (1, 4, T, T) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    assert not np.triu(weights, 1).any()
    # Without the padding that `attention` adds.
    alone = attention_weights(bind(lm.spec, lm.params), ids[None])[:, 0]
    np.testing.assert_allclose(weights, alone, atol=1e-5)
    assert lm.attention("").shape == (1, 4, 0, 0)
    assert lm.attention("x" * CONTEXT).shape == (1, 4, CONTEXT, CONTEXT)


def test_token_ids_are_taken_for_texts(lm):
    ids = lm.encode("The cat")
    few = {"max_new_tokens": 3, "seed": 4, "top": 2}
    for one in (ids, ids.tolist(), tuple(ids.tolist())):
        assert lm.score(one).records() == lm.score("The cat").records()
        assert lm.generate(one, **few).records() == lm.generate("The cat", **few).records()
    both = lm.score([ids, "ab", [0xC3]])
    assert [score.text for score in both] == ["The cat", "ab", "\ufffd"]
    assert lm.score(np.stack([ids, ids])).records() == lm.score(["The cat"] * 2).records()
    assert len(lm.generate([ids, [65]], num_samples=2, **few)) == 4
    assert [token.id for token in lm.stream(ids, **few)] == [
        token.id for token in lm.generate(ids, **few).new_tokens
    ]
    np.testing.assert_array_equal(lm.distribution(ids), lm.distribution("The cat"))
    np.testing.assert_array_equal(lm.attention(ids), lm.attention("The cat"))


def test_what_changes_nothing_is_as_good_as_not_given(lm):
    few = {"max_new_tokens": 4, "temperature": 0.9}
    plain = lm.generate("ab", **few, top_k=0).records()
    neutral = {"seed": None, "top_p": None, "stop": None, "watch": None, "greedy": None}
    other = {"repetition_penalty": 1.0, "num_beams": 1, "top_k": -1}
    assert lm.generate("ab", **few, **neutral, **other).records() == plain
    assert lm.score("ab", top=None, stride=None).records() == lm.score("ab").records()
    assert lm.generate("ab", **few, stop=[], top_k=0).records() == plain


def test_a_model_that_is_not_finite_gives_no_number_anywhere(lm):
    text, name = "the clocks were " * 9, "blocks.0.attention.query.weight"
    weight = lm.params[name].at[3, 5].set(np.nan)
    broken = dataclasses.replace(lm, params={**lm.params, name: weight})
    for call in (broken.distribution, broken.score):
        for given in (text, text[:9]):
            with pytest.raises(NonFiniteError, match="not finite"):
                call(given)
    for call in (broken.generate, broken.attention):
        with pytest.raises(NonFiniteError, match="not finite"):
            call(text[:9])
    assert broken.distribution("t").shape == (0, lm.spec.vocab_size)


def test_text_to_ids_and_back(lm):
    assert lm.encode("h\u00e9").tolist() == [104, 0xC3, 0xA9]
    assert lm.decode(lm.encode("h\u00e9")) == lm.decode([104, 0xC3, 0xA9]) == "h\u00e9"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lm: lm.generate("a", top_p=1.5), ["top_p", "1.5", "generate"]),
        (lambda lm: lm.generate("a", temperature=float("nan")), ["temperature"]),
        (lambda lm: lm.generate("a", max_new_tokens=1.5), ["max_new_tokens", "1.5", "integer"]),
        (lambda lm: lm.generate("a", max_new_tokens=True), ["max_new_tokens"]),
        (lambda lm: lm.generate("a", max_tokens=1), ["'max_tokens'", "max_new_tokens"]),
        (lambda lm: lm.generate("a", seed="x"), ["seed", "'x'"]),
        (lambda lm: lm.generate("a", num_samples=0), ["num_samples = 0"]),
        (lambda lm: lm.generate("a", num_samples=1.0), ["num_samples", "float"]),
        (lambda lm: lm.generate("x" * 65), ["65", "64"]),
        (lambda lm: lm.generate(b"a"), ["prompt", "bytes", "str"]),
        (lambda lm: lm.generate(["a", 3]), ["prompt[1]", "int"]),
        (lambda lm: lm.generate("a", repetition_penalty=1.1), ["repetition_penalty", "it takes"]),
        (lambda lm: lm.generate("a", top_k=-2), ["top_k", "-2"]),
        (lambda lm: lm.generate([1, 257]), ["prompt", "257", "256"]),
        (lambda lm: lm.score([[1], [-1]]), ["text[1]", "-1"]),
        (lambda lm: lm.score([[1], []]), ["text[1]", "list"]),
        (lambda lm: lm.score([1.5]), ["text[0]", "float"]),
        (lambda lm: lm.score([True]), ["text[0]", "bool"]),
        (lambda lm: lm.generate("a", stop=""), ["stop", "empty"]),
        (lambda lm: lm.generate("a", stop=[b"x"]), ["stop[0]", "bytes"]),
        (lambda lm: lm.generate("a", greedy=True, temperature=0.5), ["greedy", "temperature"]),
        (lambda lm: lm.generate("a", greedy=1), ["greedy", "True"]),
        (lambda lm: lm.generate("a", watch=[257]), ["watch", "257", "256"]),
        (lambda lm: lm.stream("a", top_p=0.0), ["top_p", "stream"]),  # before the first token
        (lambda lm: lm.stream(["a"]), ["prompt", "list"]),
        (lambda lm: lm.stream("a", num_samples=2), ["num_samples"]),
        (lambda lm: lm.score(b"ab"), ["bytes", "decode"]),
        (lambda lm: lm.score(7), ["7", "int"]),
        (lambda lm: lm.score("ab", top=-1), ["top = -1"]),
        (lambda lm: lm.score("ab", top=2.0), ["top", "float"]),
        (lambda lm: lm.score("ab", stride=65), ["stride", "65", "64"]),
        (lambda lm: lm.score("ab", watch="ab"), ["watch", "ids"]),
        (lambda lm: lm.score("ab", tops=3), ["'tops'", "top"]),
        (lambda lm: lm.score("\ud800"), ["ud800"]),
        (lambda lm: lm.attention("x" * 65), ["65", "64"]),
        (lambda lm: lm.distribution(["ab"]), ["list"]),
        (lambda lm: lm.decode([300]), ["300", "256"]),
        (lambda lm: lm.score("ab").write("no/such/folder/x.jsonl"), ["no/such/folder"]),
        (lambda lm: llm.load(3), ["3", "path"]),
        (lambda lm: llm.load(lm.path, 6), ["6", "5, 7"]),
        (lambda lm: llm.load(lm.path, "7"), ["step", "str"]),
        (lambda lm: llm.load(lm.path, devices=9), ["9", "8"]),
        (lambda lm: llm.load(lm.path, devices=["cpu"]), ["'cpu'", "devices"]),
        (lambda lm: llm.load(lm.path / "nothing"), ["nothing"]),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(lm, call, words):
    with pytest.raises(UsageError) as raised:
        call(lm)
    assert all(word in str(raised.value) for word in words), raised.value


def test_nothing_of_a_model_or_a_result_can_be_set(lm):
    s = lm.score("ab")
    for thing, name in ((lm, "params"), (s, "finish"), (s.tokens[1], "logprob")):
        with pytest.raises(AttributeError):
            setattr(thing, name, 0)


def test_a_notebook_shows_the_page_and_a_long_text_as_a_line(lm, monkeypatch):
    s = lm.score('a "quote" & </iframe>\u5b50')
    frame = s._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts" srcdoc="') and frame.isascii()
    assert frame.count("<") == 2, "the document is escaped as a whole"
    assert lm.score(["ab", "cd"])._repr_html_() is not None
    monkeypatch.setattr(results, "MOST_SHOWN_TOKENS", 10)
    assert s._repr_html_() is None and "nats" in repr(s)


def test_the_page_works_in_a_frame_that_the_notebook_cannot_break(lm, tmp_path):
    """Colours, script and links, in an outer page whose style would ruin it; nothing is refused."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.support.wait import WebDriverWait

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium with its driver")
    hostile = "span,td{display:block!important;background:red!important}"
    outer = tmp_path / "notebook.html"
    frame = lm.score("the cat \u5b50")._repr_html_()
    outer.write_text(  # in another encoding than the page was made for
        f'<!doctype html><meta charset="latin1"><style>{hostile}</style><h1>Notebook</h1>{frame}'
    )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1300,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.get(outer.as_uri())
        browser.switch_to.frame(browser.find_element("css selector", "iframe"))
        tokens = browser.find_elements("css selector", ".t")
        colours = {token.value_of_css_property("background-color") for token in tokens[1:]}
        assert len(colours) > 1 and "rgba(255, 0, 0, 1)" not in colours
        assert tokens[1].value_of_css_property("display") != "block"
        tokens[2].click()
        assert "token 3 of 11" in browser.find_element("id", "panel").text
        details = "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
        browser.execute_script(details)
        link = WebDriverWait(browser, 10).until(
            lambda b: b.find_elements("css selector", 'a[href$="#s0t1"]')
        )[0]
        browser.execute_script("arguments[0].click()", link)
        WebDriverWait(browser, 10).until(
            lambda b: "token 2 of 11" in b.find_element("id", "panel").text
        )
        with pytest.raises(WebDriverException, match="Blocked a frame"):
            browser.execute_script("return parent.document.title")
        assert browser.get_log("browser") == []
    finally:
        browser.quit()


@pytest.mark.parametrize(
    ("model", "devices", "axes"),
    [
        ({"n_head": 12, "d_model": 768}, 1, {}),
        ({"n_head": 12, "d_model": 768}, 8, {"tensor": 4, "fsdp": 2}),  # GPT-2
        ({"n_head": 25, "d_model": 1600}, 8, {"fsdp": 8}),  # GPT-2 XL
        ({"n_head": 32, "n_kv_head": 8, "d_model": 4096, "d_ff": 14336}, 8, {"tensor": 8}),
        ({"n_head": 8, "n_kv_head": 1, "d_model": 64}, 4, {"fsdp": 4}),
        ({"n_head": 3, "d_model": 33}, 8, {}),  # nothing divides: one device
    ],
)  # fmt: skip
def test_a_model_is_spread_by_what_its_sizes_allow(model, devices, axes):
    spec = ModelSpec(ModelConfig(n_layer=1, **model), 257)
    mesh = predicting_mesh(spec, jax.devices()[:devices])
    assert {name: size for name, size in mesh.shape.items() if size > 1} == axes
    check_divisible(mesh, spec.config, spec.padded_vocab_size, batch_size=mesh.size)


@pytest.fixture(scope="module")
def spread(folder):
    return llm.load(folder / "runs/mine", devices=8)


@pytest.mark.thorough
def test_each_device_holds_its_share_of_the_weights_and_the_numbers_are_the_same(lm, spread):
    assert "8 x cpu" in repr(spread)
    for name, weight in spread.params.items():
        if weight.ndim > 1 and name != "embed.position":
            assert {shard.data.size * 8 for shard in weight.addressable_shards} == {weight.size}
    assert spread.params_sha256 == lm.params_sha256
    one, other = (model.score("the clocks") for model in (lm, spread))
    np.testing.assert_allclose(other.logprobs, one.logprobs, atol=2e-5)
    one, other = (model.generate("def ", max_new_tokens=20, seed=5) for model in (lm, spread))
    assert other.ids.tolist() == one.ids.tolist()
    np.testing.assert_allclose(other.logprobs, one.logprobs, atol=2e-5)
    np.testing.assert_allclose(spread.attention("the"), lm.attention("the"), atol=1e-5)
    np.testing.assert_allclose(spread.distribution("the"), lm.distribution("the"), atol=2e-5)


def test_no_device_gathers_a_weight_and_the_cache_is_divided(spread):
    """Read from the compiled programs: what collectives carry is smaller than any matrix."""
    spec, params = spread.spec, spread.params
    smallest = min(weight.size for weight in params.values() if weight.ndim > 1)
    decoder = Decoder.create(spec, params, spread.tokenizer)
    batch = decoder.batch([Request([1, 2, 3], Sampling(), top=10)])
    state, _ = exhaust(decoder.prefill(batch, CONTEXT))
    for keys in state.cache.keys:  # [B, K, S, H], K over four devices
        shapes = {shard.data.shape[:3] for shard in keys.addressable_shards}
        assert shapes == {(1, 1, CONTEXT)}
    decoding = decode_chunk.lower(
        decoder.spec, decoder.params, state, batch.settings, batch.watch_BW, np.ones(1, bool), 4,
        256, top=batch.top,
    )  # fmt: skip
    ids = np.zeros((1, 16), np.int32)
    scoring = _describe_batch.lower(spec, params, ids, ids, np.zeros((1, 0), np.int32), 10)
    for program in (decoding.compile(), scoring.compile()):
        carried = carried_sizes(program.as_text())
        assert carried and max(carried) < smallest


def carried_sizes(program):
    """Elements of the result of each collective in a compiled program's text."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    shapes = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* (?:{kinds})(?:-start)?\(", program)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


def test_the_examples_of_the_documentation_run(folder, monkeypatch, capsys):
    pytest.importorskip("pandas")
    monkeypatch.chdir(folder)
    text = (ROOT / "docs/python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert (folder / "samples.jsonl").exists() and (folder / "samples.html").exists()
    assert "top_p = 1.5" in capsys.readouterr().out
    s, g = names["s"], names["g"]
    assert s.text.startswith("It was") and g.text.startswith("def ")
    assert sum(token.logprob for token in g.new_tokens) == pytest.approx(-g.total_nats)
