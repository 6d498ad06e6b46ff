"""`sample.py` and `python -m llm score` from end to end on a tiny model: what the shell sees."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import llm.commands.sample
import llm.commands.score
import llm.commands.shared
import llm.inference.samples
import llm.pages.attention
import llm.run.open
from llm.commands import run_command
from llm.commands.score import worst_passages
from llm.config import Config, SamplingConfig
from llm.errors import UsageError
from llm.inference.decode import NewTokens
from llm.inference.records import read_records
from llm.inference.samples import continued, in_order, make_requests, overlay
from llm.model.gpt import ModelSpec, bind, initialise
from llm.model_config import ModelConfig
from llm.pages.attention import attention_weights
from llm.pages.attention_view import attention_page
from llm.run.open import OpenedModel
from llm.text.tokenizer import ByteTokenizer, CharacterTokenizer

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 64
MODEL = ModelConfig(n_layer=1, n_head=2, d_model=16, context_length=CONTEXT)
SAMPLE = SamplingConfig(max_new_tokens=12, temperature=0.9, top_k=50, seed=3)


def opened(tokenizer, compute_dtype="float32"):
    spec = ModelSpec(MODEL, tokenizer.vocab_size, compute_dtype)
    params = jax.jit(initialise, static_argnums=0)(spec, jax.random.key(0))
    return OpenedModel(
        spec=spec,
        params={name: 8.0 * w if w.ndim > 1 else w for name, w in params.items()},
        tokenizer=tokenizer,
        config=Config(model=MODEL, sample=SAMPLE),
        step=7,
        params_sha256="ab" * 32,
        receipt_max_abs_diff=0.0,
        run="mine",
        path=Path("runs/mine"),
    )


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """open_model gives this one for any run directory."""
    chosen = {"model": opened(ByteTokenizer())}
    monkeypatch.setattr(llm.run.open, "open_model", lambda run, step=None: chosen["model"])
    monkeypatch.setattr(llm.commands.shared, "prepare_process", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    return chosen


def sample(*arguments):
    return run_command(llm.commands.sample.main, ["runs/mine", *map(str, arguments)])


def score(*arguments):
    return run_command(llm.commands.score.main, ["runs/mine", *map(str, arguments)])


def test_text_on_stdout_is_the_end_records_text(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    assert sample("--prompt", "def main(", "--num_samples", 2, "--probs", path, "--top=4") == 0
    captured = capsys.readouterr()
    run, *records = read_records(path)
    ends = [record for record in records if record["type"] == "end"]
    assert captured.out == "".join(end["text"] + "\n" for end in ends)
    assert "sample 0" in captured.err and "sample 1" in captured.err
    assert run["sampling"] == {
        "temperature": 0.9, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "seed": 3
    }  # fmt: skip
    assert run["checkpoint"] == {"run": "mine", "step": 7, "params_sha256": "ab" * 32}
    assert (run["numerics"]["path"], run["top"]) == ("cached", 4)
    for number, end in enumerate(ends):
        tokens = [r for r in records if r["type"] == "token" and r["sample"] == number]
        assert [t["position"] for t in tokens] == list(range(9 + 12))
        assert [t["phase"] for t in tokens] == ["prompt"] * 9 + ["generated"] * 12
        assert "".join(t["text"] for t in tokens) == end["text"]
        assert end["text"].startswith("def main(")
        assert tokens[0]["logprob"] is None and tokens[0]["top"] == []
        assert all(len(t["top"]) == 4 for t in tokens[1:])
        drawn = [t["logprob"] for t in tokens[9:]]
        assert end["sum_logprob"] == pytest.approx(sum(drawn), rel=1e-9)
    # All of one sample, then all of the next.
    assert [r["sample"] for r in records] == sorted(r["sample"] for r in records)


@pytest.mark.thorough
def test_the_dump_does_not_change_the_text(capsys, tmp_path):
    assert sample("--prompt", "abc", "--seed", 5) == 0
    plain = capsys.readouterr().out
    assert sample("--prompt", "abc", "--seed", 5, "--probs", tmp_path / "p.jsonl") == 0
    assert capsys.readouterr().out == plain
    assert sample("--prompt", "abc", "--seed", 6) == 0
    assert capsys.readouterr().out != plain


@pytest.mark.thorough
def test_each_prompt_gets_the_samples_that_it_would_get_alone(capsys):
    def text(*arguments):
        assert sample(*arguments) == 0
        return capsys.readouterr().out

    alone = [text("--prompt", prompt, "--num-samples", 2) for prompt in ("ab", "xyz w")]
    assert text("--prompt", "ab", "xyz w", "--num-samples", 2) == "".join(alone)
    assert text("--prompt", "ab", "--prompt", "xyz w", "--num-samples", 2) == "".join(alone)


@pytest.mark.thorough
def test_flags_overrule_the_runs_section_and_greedy_is_temperature_zero(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    flags = ("--greedy", "--max-new-tokens", 3, "--top_k", -1, "--watch", 5, 6, "--probs", path)
    assert sample("--prompt", "q", *flags) == 0
    run, *tokens, end = read_records(path)
    assert run["sampling"]["temperature"] == 0.0 and run["sampling"]["top_k"] == 0
    assert (end["tokens"], end["finish"]) == (3, "length")
    for token in tokens[1:]:
        assert {5, 6} <= {entry["id"] for entry in token["top"]}
    assert all(t["rank"] == 1 and t["sampling_logprob"] == 0.0 for t in tokens[1:])
    capsys.readouterr()


def test_the_empty_prompt_starts_from_an_end_of_text(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    assert sample("--probs", path) == 0
    _, first, second, *_ = read_records(path)
    assert (first["phase"], first["id"], first["bytes"], first["text"]) == ("prompt", 256, [], "")
    assert first["token"] == "<|endoftext|>" and first["logprob"] is None
    assert second["phase"] == "generated" and second["logprob"] is not None
    capsys.readouterr()


def test_prompts_from_files_and_standard_input(tmp_path, monkeypatch, capsys):
    file = tmp_path / "prompt.txt"
    file.write_bytes("\u5b50\u66f0\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin")))
    assert sample("-", "--prompt-file", file, "--max-new-tokens", 0) == 0
    assert capsys.readouterr().out == "\u5b50\u66f0\n\nfrom stdin\n"


def test_a_pipe_is_read_when_it_has_text_and_not_waited_for_when_silent(monkeypatch, capsys):
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading, "r"))
    assert sample("--max-new-tokens", 0) == 0  # would hang here if it waited
    captured = capsys.readouterr()
    assert captured.out == "\n" and "not read" in captured.err
    os.write(writing, b"piped")
    os.close(writing)
    assert sample("--max-new-tokens", 0) == 0
    assert capsys.readouterr().out == "piped\n"


def test_bytes_that_are_not_utf8(tmp_path, model, capsys):
    file = tmp_path / "bytes"
    file.write_bytes(b"ab\xff")
    path = tmp_path / "out.jsonl"
    assert sample("--prompt-file", file, "--max-new-tokens", 1, "--probs", path) == 0
    tokens = read_records(path)[1:4]
    assert [t["bytes"] for t in tokens] == [[97], [98], [255]]
    model["model"] = opened(CharacterTokenizer("ab\n"))
    assert sample("--prompt-file", file) == 2
    error = capsys.readouterr().err
    assert "0xff" in error and "offset 2" in error


@pytest.mark.parametrize("command", [sample, score])
def test_a_vocabulary_smaller_than_top_is_listed_whole(command, model, tmp_path, capsys):
    model["model"] = opened(CharacterTokenizer("ab\n"))
    path, flag = tmp_path / "out.jsonl", "--text" if command is score else "--prompt"
    assert command(flag, "abab", "--top", 10, "--watch", 1, "--probs", path) == 0
    run, first, *tokens, _ = read_records(path)
    assert (run["top"], first["top"]) == (3, [])
    assert all(sorted(entry["id"] for entry in token["top"]) == [0, 1, 2] for token in tokens)
    capsys.readouterr()


def test_stop_strings_and_probs_to_stdout(capsys):
    assert sample("--prompt", "z", "--greedy", "--max-new-tokens", 12, "--probs", "-") == 0
    *_, end = map(json.loads, capsys.readouterr().out.splitlines())
    stop = end["text"][4:7]
    assert sample("--prompt", "z", "--greedy", "--stop", stop, "--probs", "-") == 0
    *tokens, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert end["finish"] == "stop" and stop not in end["text"][1:]
    assert "".join(t["text"] for t in tokens[1:]) == end["text"]


def test_a_seed_beyond_64_bits_is_refused_from_python_too():
    assert overlay(SAMPLE, {"seed": 2**63 - 1}, "generate").seed == 2**63 - 1
    for seed in (2**63, 2**70, -(2**63) - 1):
        with pytest.raises(UsageError, match="seed"):
            overlay(SAMPLE, {"seed": seed}, "generate")


@pytest.mark.thorough
def test_a_full_context_is_said_once(capsys):
    long = ("--prompt", "x" * 60, "--greedy", "--num-samples", 2, "--max-new-tokens")
    assert sample(*long, 5, "--probs", "-") == 0
    said = "the context of 64 tokens is full after 4 new tokens; 5 were asked for\n"
    captured = capsys.readouterr()
    assert captured.err == said and "context of" not in captured.out
    assert sample(*long, 4) == 0
    assert "context" not in capsys.readouterr().err
    assert sample("--prompt", "x" * 63, "y" * 61, "--greedy", "--max-new-tokens", 9) == 0
    assert "full after 1 to 3 new tokens; 9 were asked for\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", [sample, lambda: score("--text", "ab")])
def test_a_warning_is_one_clean_line(command, model, monkeypatch, capsys):
    def warning(run, step=None):
        warnings.warn("step 20 is passed over: x has changed", stacklevel=2)
        return model["model"]

    monkeypatch.setattr(llm.run.open, "open_model", warning)
    assert command() == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "WARNING: step 20 is passed over: x has changed"
    assert not any("UserWarning" in line for line in said)


def test_score_counts_one_token_as_one(capsys):
    assert score("--text", "ab") == 0
    assert capsys.readouterr().err.startswith("1 token \u00b7")


def test_a_page_is_written(tmp_path, capsys):
    path = tmp_path / "out.html"
    assert sample("--prompt", "<b>", "--html", path) == 0
    page = path.read_text()
    assert "mine" in page and "step 7" in page
    capsys.readouterr()


def test_colour_is_off_when_piped(capsys):
    assert sample("--prompt", "a", "--color") == 0
    assert "\x1b[" not in capsys.readouterr().out


def test_colour_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert sample("--prompt", "a", "--color") == 0
    assert "\x1b[" in capsys.readouterr().out


@pytest.mark.thorough
def test_in_bfloat16_the_distance_from_a_full_pass_is_measured(model, tmp_path, capsys):
    model["model"] = opened(ByteTokenizer(), "bfloat16")
    path = tmp_path / "out.jsonl"
    assert sample("--prompt", "abc", "--probs", path) == 0
    numerics = read_records(path)[0]["numerics"]
    assert numerics["compute_dtype"] == "bfloat16" and numerics["param_dtype"] == "float32"
    assert 0.0 <= numerics["cached_minus_full_nats"] < 1.0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top-p", "1.5"], ["--top-p 1.5"]),
        (["--top-p", "0"], ["--top-p 0"]),
        (["--temperature", "-1"], ["--temperature -1"]),
        (["--temperature", "nan"], ["temperature"]),
        (["--min-p", "2"], ["--min-p 2"]),
        (["--top-k", "-3"], ["--top-k -3"]),
        (["--num-samples", "0"], ["--num-samples 0"]),
        (["--max-new-tokens", "-1"], ["--max-new-tokens -1"]),
        (["--top", "-1"], ["--top"]),
        (["--watch", "257"], ["watch", "257"]),
        (["--stop", ""], ["stop"]),
        (["--prompt", "x" * 70], ["70", "64", "by 6 tokens"]),
        (["--prompt", "x" * 65], ["65", "64", "by 1 token\n"]),
        (["--seed", "99999999999999999999"], ["seed", "less than 9223372036854775808"]),
        (["--prompt-file", "no/such/file"], ["no/such/file"]),
        (["--probs", "no/such/folder/out.jsonl"], ["no/such/folder"]),
        (["--html", "/"], ["folder"]),
        (["--probs", "same", "--html", "./same"], ["--probs", "--html", "same"]),
    ],
    ids=lambda value: " ".join(value)[:24],
)
def test_wrong_inputs_are_named_and_exit_2(arguments, words, capsys):
    assert sample(*arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments", [["--top-p", "high"], ["--no-such-flag"], ["--greedy", "--temperature", "1"]]
)
def test_flags_that_cannot_be_parsed_exit_2(arguments, capsys):
    assert sample(*arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_an_unseen_character_is_named(model, capsys):
    model["model"] = opened(CharacterTokenizer("ab\n"))
    assert sample("--prompt", "abc") == 2
    assert "'c'" in capsys.readouterr().err


def test_help_does_not_import_jax():
    code = """
import sys
from llm.commands.sample import main
try:
    main(["--help"])
except SystemExit:
    assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_rows_come_one_after_the_other():
    early = [NewTokens(1, ["b"], None), NewTokens(0, ["a"], None), NewTokens(2, ["c"], "length")]
    late = [NewTokens(1, ["B"], "length"), NewTokens(0, ["A"], "length")]
    ordered = [(p.row, *p.tokens) for p in in_order(early + late)]
    assert ordered == [(0, "a"), (0, "A"), (1, "b"), (1, "B"), (2, "c")]


def test_samples_of_several_batches_are_numbered_through(monkeypatch):
    class Alone:
        def generate(self, requests):
            for row, one in enumerate(requests):
                yield NewTokens(row, [(one.sample, one.index)], "length")

    monkeypatch.setattr(llm.inference.samples, "MAX_ROWS", 4)
    requests = make_requests(SamplingConfig(num_samples=2), ["a", "b", "c"], ByteTokenizer())
    numbered = [number for new in continued(Alone(), requests) for number in new.tokens]
    assert numbered == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0), (5, 1)]


def test_score_sums_what_its_records_say(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    long = "It was a bright cold day in April, and the clocks were striking. " * 2
    assert score("--text", long, "abc", "", "--probs", path, "--json", "--top", 2) == 0
    summary = json.loads(capsys.readouterr().out)
    run, *records = read_records(path)
    assert run["sampling"] is None and run["numerics"]["path"] == "teacher_forced"
    tokens = [r for r in records if r["type"] == "token" and r["logprob"] is not None]
    ends = [r for r in records if r["type"] == "end"]
    assert len(tokens) == summary["tokens"] == len(long) - 1 + 2
    total = -sum(token["logprob"] for token in tokens)
    assert summary["total_nats"] == pytest.approx(total, rel=1e-9)
    assert summary["perplexity"] == pytest.approx(np.exp(total / len(tokens)), rel=1e-6)
    assert summary["bits_per_byte"] == pytest.approx(total / np.log(2) / len(tokens), rel=1e-6)
    assert [end["text"] for end in ends] == [long, "abc", ""]
    assert [end["tokens"] for end in ends] == [len(long) - 1, 2, 0]
    worst = summary["worst"][0]
    of_text = [token for token in tokens if token["sample"] == worst["sample"]]
    passage = of_text[worst["position"] - 1 :][: worst["tokens"]]
    assert worst["nats"] == pytest.approx(-sum(t["logprob"] for t in passage), rel=1e-6)
    assert worst["text"] == "".join(t["text"] for t in passage)


def test_the_worst_passages_are_those_of_the_largest_sums():
    surprisals = np.random.default_rng(0).exponential(size=200)
    found = worst_passages(surprisals.tolist())
    sums = np.convolve(surprisals, np.ones(16), "valid")
    assert found[0] == (int(np.argmax(sums)), int(np.argmax(sums)) + 16)
    taken = np.zeros(200, int)
    for start, end in found:
        taken[start:end] += 1
    assert taken.max() == 1 and len(found) == 5
    assert worst_passages([1.0, 2.0]) == [(0, 2)]
    assert worst_passages([]) == []


def test_score_writes_whole_distributions_and_openais_shape(tmp_path, capsys):
    full, completion = tmp_path / "full.npz", tmp_path / "openai.json"
    text = "h\u00e9!"
    flags = ("--full", full, "--probs", completion, "--format", "openai", "--top", 3)
    assert score("--text", text, "zz", *flags) == 0
    said = capsys.readouterr().err
    assert "bits per byte" in said and "worst" in said
    choice = json.loads(completion.read_text())["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == text
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert token in top and len(top) in (3, 4)  # the token itself, also where it is not likely
    arrays = np.load(full)
    assert arrays["ids_0"].tolist() == list(text.encode())
    assert arrays["logprobs_0"].shape == (3, 257) and arrays["logprobs_1"].shape == (1, 257)
    np.testing.assert_allclose(np.exp(arrays["logprobs_0"]).sum(-1), 1.0, atol=1e-5)
    picked = arrays["logprobs_0"][range(3), arrays["ids_0"][1:]]
    np.testing.assert_allclose(picked, logprobs["token_logprobs"][1:], atol=1e-5)


@pytest.mark.thorough
def test_score_writes_where_each_head_looks(tmp_path, model, capsys):
    arrays, text = tmp_path / "attention.npz", "<b>h\u00e9 says h\u00e9</b>"
    assert score("--text", text, "z", "--attention", arrays) == 0
    written, opened = np.load(arrays), model["model"]
    assert set(written) == {"ids_0", "attention_0", "ids_1", "attention_1"}
    ids, weights = written["ids_0"], written["attention_0"]
    assert bytes(ids.tolist()) == text.encode()
    assert weights.dtype == np.float32 and weights.shape == (1, 2, len(ids), len(ids))
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    assert not np.triu(weights, 1).any() and written["attention_1"].tolist() == [[[[1.0]]] * 2]
    alone = attention_weights(bind(opened.spec, opened.params), ids[None])
    np.testing.assert_allclose(weights, alone[:, 0], atol=1e-5)
    page, probs = tmp_path / "attention.html", tmp_path / "probs.jsonl"
    outputs = ("--attention", arrays, "--attention-html", page, "--probs", probs)
    assert score("--text", text, *outputs) == 0
    np.testing.assert_array_equal(np.load(arrays)["attention_0"], weights)
    shown = attention_page(
        weights,
        [record for record in read_records(probs) if record["type"] == "token"],
        title="Attention of mine, step 7",
    )
    assert page.read_text() == shown and "<b>h" not in shown
    capsys.readouterr()


def test_attention_that_does_not_fit_is_refused_with_its_size(tmp_path, monkeypatch, capsys):
    # 2 heads x 60 x 60 x 4 bytes; a page carries its lower triangles, 2 x 60 x 61 / 2.
    monkeypatch.setattr(llm.pages.attention, "LARGEST_BYTES", 28799)
    target = ("--text", "x" * 60, "--attention", tmp_path / "x.npz")
    assert score(*target) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("28.1 KiB", "1 layers x 2 heads", "59 tokens")), error
    monkeypatch.setattr(llm.pages.attention, "LARGEST_BYTES", 28800)
    assert score(*target) == 0
    monkeypatch.setattr(llm.pages.attention_view, "MOST_PAGE_WEIGHTS", 3659)
    capsys.readouterr()
    assert score(*target, "--attention-html", tmp_path / "x.html") == 2
    error = capsys.readouterr().err
    assert "3,660 weights" in error and "--attention FILE.npz" in error, error


def test_score_reads_files_and_standard_input(tmp_path, monkeypatch, capsys):
    file = tmp_path / "text.txt"
    file.write_text("abcdef")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ghij")))
    assert score("-", "--file", file, "--stride", 4, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["texts"], summary["tokens"]) == (2, 5 + 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no text", "--file"]),
        (["--text", "a"], ["nothing to score"]),
        (["--text", "ab", "--stride", "65"], ["stride", "65", "64"]),
        (["--text", "ab", "--stride", "-1"], ["stride"]),
        (["--text", "ab", "--watch", "-5"], ["-5"]),
        (["--text", "ab", "--json", "--probs", "-"], ["stdout"]),
        (["--text", "ab", "--format", "openai"], ["--probs"]),
        (["--text", "ab", "--full", "x", "--attention", "x"], ["--full", "--attention", "x"]),
        (["--file", "no/such/file"], ["no/such/file"]),
        (["--text", "ab", "--full", "no/such/folder/x.npz"], ["no/such/folder"]),
        (["--text", "ab", "--attention", "no/such/folder/x.npz"], ["no/such/folder"]),
        (["--text", "ab", "--attention-html", "no/such/folder/x"], ["no/such/folder"]),
        (["--text", "ab", "x" * 70, "--attention", "x.npz"], ["--text", "70", "64", "6 tokens"]),
        (["--text", "ab", "cd", "--attention-html", "x.html"], ["one text", "2", "--attention"]),
    ],
    ids=lambda value: " ".join(value)[:24],
)
def test_wrong_inputs_of_score_are_named_and_exit_2(arguments, words, capsys):
    assert score(*arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize("format_", ["records", "openai"])
def test_a_full_disk_is_named_and_exits_2(format_, capsys):
    assert score("--text", "ab" * 20, "--probs", "/dev/full", "--format", format_) == 2
    if format_ == "records":
        assert sample("--max-new-tokens", 3, "--probs", "/dev/full") == 2
    error = capsys.readouterr().err
    assert "error: cannot write /dev/full: No space left on device" in error


def test_both_commands_raise_usage_errors_themselves():
    with pytest.raises(UsageError):
        llm.commands.sample.main(["runs/mine", "--top-p", "1.5"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_behind_standard_output_is_said():
    """A process of its own: what Python still holds for standard output is written at its end."""
    program = (
        "import sys\nfrom llm.commands import run_command\n"
        "def command(words):\n    print('text' * 5000)\n    return 0\n"
        "sys.exit(run_command(command))\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no room to write (No space left on device)" in done.stderr
