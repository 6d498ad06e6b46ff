"""lm-evaluation-harness on our models gives the numbers that its own models give."""

import argparse
import errno
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import QUICK_COMPILING

import llm.run.open
from llm.commands import run_command
from llm.commands.eval import _report, main
from llm.commands.import_hf import write_run
from llm.config import Config
from llm.errors import UsageError
from llm.inference.decode import Decoder, Request
from llm.inference.records import Sampling
from llm.inference.score import Scorer
from llm.model.gpt import ModelSpec, bind, initialise
from llm.model_config import ModelConfig
from llm.run.open import OpenedModel
from llm.text.bpe import train_bpe
from llm.text.tokenizer import END_OF_TEXT, CharacterTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from llm.interop.hf import to_hf
from llm.interop.lm_eval import HarnessModel, load_tasks, request_of, run_tasks

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 32
MODEL = ModelConfig(n_layer=1, n_head=2, d_model=16, context_length=CONTEXT)
SENTENCE = "the cat sat on the mat and the dog ran to the red hat, said the quick brown fox"
WORDS = SENTENCE.split()
CORPUS = " ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(400))

CHOICES = [
    {"question": "the cat sat on the ", "choices": ["mat", "dog ran", "fox said the"], "answer": 0},
    {"question": "the dog ran to", "choices": [" the", " a red", " mat"], "answer": 1},
    {"question": "", "choices": ["the cat", "and", "x"], "answer": 2},
    {"question": CORPUS[:90], "choices": [" the", " cat", " 學而時習之"], "answer": 0},
]  # fmt: skip
DOCUMENTS = [{"text": CORPUS[:25]}, {"text": CORPUS[100:500]}, {"text": "學而時習之，不亦說乎？"}]
PROMPTS = [{"prompt": text} for text in ("the cat", "and the dog ", CORPUS[:120], "quick brown")]

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 2.5}
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
metadata: {version: 1}
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: ""
generation_kwargs: {until: ["at", "o"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
DATA = {"choices": CHOICES, "rolling": DOCUMENTS, "writing": PROMPTS}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks and their data, as --include-path takes it."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, description in TASKS.items():
        write_task(folder, name, description, DATA[name])
    return folder


def write_task(folder, name, description, rows):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = f"{{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}"
    common = f"task: {name}\ndataset_path: json\ndataset_kwargs: {read}\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(common + description)


def opened(tokenizer, config=MODEL):
    spec = ModelSpec(config, tokenizer.vocab_size)
    params = jax.jit(initialise, static_argnums=0)(spec, jax.random.key(0))
    return OpenedModel(
        spec=spec,
        params={name: 8.0 * w if w.ndim > 1 else w for name, w in params.items()},
        tokenizer=tokenizer,
        config=Config(model=config),
        step=7,
        params_sha256="ab" * 32,
        receipt_max_abs_diff=0.0,
        run="mine",
        path=Path("runs/mine"),
    )


@pytest.fixture(scope="module")
def model():
    return opened(train_bpe([CORPUS], 280))


@pytest.fixture(autouse=True)
def the_run(monkeypatch, model):
    """open_model gives this one for any run directory."""
    monkeypatch.setattr(llm.run.open, "open_model", lambda run, step=None: model)
    for module in (llm.commands.eval, llm.commands.shared):
        monkeypatch.setattr(module, "prepare_process", lambda: None)


def adapter(model, **settings):
    return HarnessModel(model.spec, model.params, model.tokenizer, **settings)


def run(*arguments):
    return run_command(main, ["runs/mine", *map(str, arguments)])


def results_of(capsys, *arguments):
    """The object that --json prints, and what was said to a person."""
    status = run(*arguments, "--json")
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out, parse_constant=lambda name: pytest.fail(name)), captured.err


def instances(kind, arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def logprobs_of(model, ids):
    """Of each token of `ids` but the first, by one plain pass and numpy in float64."""
    tokens = np.zeros((1, CONTEXT), np.int32)
    tokens[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(forward(model.spec, model.params, tokens), np.float64)[0, : len(ids) - 1]
    logits = logits[:, : model.spec.vocab_size]
    shifted = logits - logits.max(-1, keepdims=True)
    table = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return table[np.arange(len(ids) - 1), ids[1:]], table.argmax(-1) == ids[1:]


@functools.partial(jax.jit, static_argnums=0)
def forward(spec, params, tokens):
    return bind(spec, params)(tokens)


PAIRS = [
    ("the cat sat on the", " mat"),
    ("the cat sat on the ", "mat and the dog"),
    ("the cat\n\n  ", "sat"),
    ("", "the quick brown fox"),
    ("學而時習之", "，不亦說乎？"),
    (CORPUS[:200], " the"),
    (CORPUS[:60], CORPUS[60:110]),
]


def split(model, context, continuation):
    """The harness's conventions in other words: (ids before, ids of the continuation)."""
    encode = lambda text: model.tokenizer.encode(text).tolist()  # noqa: E731
    before = encode(context.rstrip()) or [model.tokenizer.end_of_text]
    whole = encode(context + continuation)
    return before, whole[len(encode(context.rstrip())) :]


def test_likelihoods_are_sums_of_log_probabilities_of_the_last_tokens_that_fit(model):
    answers = adapter(model).loglikelihood(instances("loglikelihood", PAIRS))
    for (total, greedy), pair in zip(answers, PAIRS, strict=True):
        before, after = split(model, *pair)
        logprobs, likeliest = logprobs_of(model, (before + after)[-(CONTEXT + 1) :])
        assert total == pytest.approx(logprobs[-len(after) :].sum(), abs=1e-4)
        assert greedy == likeliest[-len(after) :].all()


def test_what_greedy_decoding_writes_is_greedy_and_nothing_else_is(model):
    kwargs = {"max_gen_toks": 1}
    prompts = ["the cat sat", "and the dog", "quick"]
    written = adapter(model).generate_until(
        instances("generate_until", [(prompt, kwargs) for prompt in prompts])
    )
    for prompt, text in zip(prompts, written, strict=True):
        pairs = [(prompt, text), (prompt, " the dog")]
        answers = adapter(model).loglikelihood(instances("loglikelihood", pairs))
        assert [greedy for _, greedy in answers] == [True, False]


def test_rolling_windows_predict_every_token_once_with_as_much_before_it_as_fits(model):
    texts = [document["text"] for document in DOCUMENTS]
    totals = adapter(model).loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in texts])
    )
    for text, total in zip(texts, totals, strict=True):
        ids = [model.tokenizer.end_of_text, *model.tokenizer.encode(text).tolist()]
        expected = logprobs_of(model, ids[: CONTEXT + 1])[0].sum()
        for start in range(CONTEXT + 1, len(ids), CONTEXT):
            window = ids[: start + CONTEXT][-(CONTEXT + 1) :]
            new = len(ids[start : start + CONTEXT])
            expected += logprobs_of(model, window)[0][-new:].sum()
        assert total == pytest.approx(expected, abs=1e-3)
    assert len(ids) > CONTEXT or len(texts[1]) > 4 * CONTEXT


def test_batch_size_changes_no_answer(model):
    documents = [(document["text"],) for document in DOCUMENTS]
    writing = [(row["prompt"], {"max_gen_toks": 12, "until": ["hat"]}) for row in PROMPTS]
    answers = []
    for size in (0, 1):
        one = adapter(model, batch_size=size)
        numbers = [total for total, _ in one.loglikelihood(instances("loglikelihood", PAIRS))]
        numbers += one.loglikelihood_rolling(instances("loglikelihood_rolling", documents))
        answers.append((numbers, one.generate_until(instances("generate_until", writing))))
    for numbers, texts in answers[1:]:
        np.testing.assert_allclose(numbers, answers[0][0], atol=1e-4)
        assert texts == answers[0][1]


def test_generation_is_the_decoders_cut_at_the_first_stop_string_and_in_order(model):
    prompts = ["the cat sat", "quick", "and the dog", CORPUS[:150]]
    whole = adapter(model).generate_until(
        instances("generate_until", [(prompt, {"max_gen_toks": 9}) for prompt in prompts])
    )
    decoder = Decoder.create(model.spec, model.params, model.tokenizer)
    for prompt, text in zip(prompts, whole, strict=True):
        ids = model.tokenizer.encode(prompt)[-(CONTEXT - 9) :]
        greedy = Request(ids, Sampling(temperature=0.0), max_new_tokens=9)
        tokens = [token for part in decoder.generate([greedy]) for token in part.tokens]
        assert text == "".join(token.text for token in tokens if token.phase == "generated")
    stops = [["", text[3:5], "no such text"] for text in whole]
    cut = adapter(model).generate_until(
        instances(
            "generate_until",
            [
                (prompt, {"max_gen_toks": 9, "until": stop})
                for prompt, stop in zip(prompts, stops, strict=True)
            ],
        )
    )
    assert cut == [text.split(stop[1])[0] for text, stop in zip(whole, stops, strict=True)]
    assert all(len(text) < len(long) for text, long in zip(cut, whole, strict=True))


def test_repeats_are_other_draws_and_the_same_seed_the_same_ones(model):
    kwargs = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    request = instances("generate_until", [("the cat", kwargs)])
    first = adapter(model, seed=1).generate_until(request * 3)
    assert len(set(first)) == 3
    assert adapter(model, seed=1).generate_until(request * 3) == first
    assert adapter(model, seed=2).generate_until(request * 3) != first
    top = {**kwargs, "top_k": 1}
    greedy = {"max_gen_toks": 12}
    likeliest = instances("generate_until", [("the cat", top), ("the cat", greedy)] * 2)
    assert len(set(adapter(model).generate_until(likeliest))) == 1


def test_a_continuation_that_no_token_is_left_for_is_encoded_apart(model):
    """ " the" is one token, so the harness's rule leaves none for the "he"."""
    encode = model.tokenizer.encode
    assert len(encode(" the")) == 1
    ((total, _),) = adapter(model).loglikelihood(instances("loglikelihood", [(" t", "he")]))
    ids = [*encode(" t"), *encode("he")]
    expected = logprobs_of(model, ids)[0][-len(encode("he")) :].sum()
    assert total == pytest.approx(expected, abs=1e-4)


def test_an_empty_continuation_is_certain(model):
    pairs = [("the cat", ""), ("", "")]
    answers = adapter(model).loglikelihood(instances("loglikelihood", pairs))
    assert answers == [(0.0, True), (0.0, True)]
    assert adapter(model).loglikelihood_rolling(instances("loglikelihood_rolling", [("",)])) == [0]


def test_a_continuation_longer_than_the_context_is_read_through_windows(model):
    long = CORPUS[:300]
    ((total, _),) = adapter(model).loglikelihood(instances("loglikelihood", [("", long)]))
    ids = [model.tokenizer.end_of_text, *model.tokenizer.encode(long)]
    assert len(ids) > 2 * CONTEXT
    (predictions,) = Scorer(model.spec, model.params, model.tokenizer).score([ids])
    assert total == pytest.approx(sum(p.logprob for p in predictions[1:]), abs=1e-4)


def test_without_an_end_of_text_a_newline_stands_before_a_text():
    model = opened(CharacterTokenizer(CORPUS + "\n"))
    newline, *text = model.tokenizer.encode("\n\nthe").tolist()
    for empty in ("", "\n"):
        given = adapter(model)._encode_request(empty, "\nthe"[len(empty) :])
        assert given == ([newline], text)
    assert [window[1:] for window in adapter(model)._rolling_windows("\nthe")] == [given]


def test_what_a_tokenizer_cannot_encode_is_named_with_its_task_and_document():
    model = opened(CharacterTokenizer(CORPUS))
    request = Instance("loglikelihood", {}, ("the cat", "學"), 0, ("choices", 3, 1))
    with pytest.raises(UsageError, match=r"task choices, document 3: the character .*學"):
        adapter(model).loglikelihood([request])
    request = Instance("loglikelihood", {}, ("", "the"), 0, ("choices", 4, 1))
    with pytest.raises(UsageError, match="document 4: the prompt is empty"):
        adapter(model).loglikelihood([request])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.0, 0, 1.0, 0.0, 16, ())),
        ({"until": "x", "max_new_tokens": 5}, (0.0, 0, 1.0, 0.0, 5, ("x",))),
        ({"until": None, "temperature": 0.5}, (0.5, 0, 1.0, 0.0, 16, ())),
        ({"do_sample": False, "temperature": 0.5}, (0.0, 0, 1.0, 0.0, 16, ())),
        ({"do_sample": True, "top_k": -1, "top_p": 0.9}, (1.0, 0, 0.9, 0.0, 16, ())),
        ({"do_sample": True, "temperature": 0, "min_p": 0.1}, (0.0, 0, 1.0, 0.1, 16, ())),
        ({"num_beams": 1, "repetition_penalty": 1.0, "max_tokens": 31}, (0.0, 0, 1.0, 0.0, 31, ())),
        ({"num_beams": None, "penalty_alpha": None}, (0.0, 0, 1.0, 0.0, 16, ())),
        (
            {"do_sample": True, "temperature": None, "top_k": None, "top_p": None, "min_p": None},
            (1.0, 0, 1.0, 0.0, 16, ()),
        ),
    ],
)  # fmt: skip
def test_generation_settings_mean_what_they_mean_to_the_harness(given, expected):
    request = request_of(given, CONTEXT, seed=5)
    drawn = request.sampling
    assert drawn.seed == 5
    found = (drawn.temperature, drawn.top_k, drawn.top_p, drawn.min_p)
    assert (*found, request.max_new_tokens, request.stop) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_beams": 4}, r"num_beams = 4.*--gen-kwargs num_beams=1"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"max_gen_toks": CONTEXT}, "max_gen_toks = 32: expected 1 to 31"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"max_gen_toks": "abc"}, "max_gen_toks = 'abc': expected an integer; .*--gen-kwargs"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5: expected an integer"),
        ({"top_k": "x"}, "top_k = 'x': expected an integer"),
        ({"until": {"a": 1}}, "until = {'a': 1}: expected a text or a list of texts"),
        ({"until": [1]}, r"until = \[1\]: expected a text or a list of texts"),
        ({"temperature": "hot"}, "temperature = 'hot': expected a number"),
        ({"do_sample": "no"}, "do_sample = 'no': expected true or false"),
    ],
)
def test_generation_settings_that_cannot_be_honoured_are_refused(given, named):
    with pytest.raises(UsageError, match=named):
        request_of(given, CONTEXT, seed=0)


def test_the_command_reports_the_harness_metrics_and_the_checkpoint(tasks, tmp_path, capsys, model):
    output, samples = tmp_path / "out.json", tmp_path / "samples.jsonl"
    results, said = results_of(
        capsys, "--tasks", "choices,rolling", "writing", "--include_path", tasks,
        "--output", output, "--samples", samples,
    )  # fmt: skip
    assert json.loads(output.read_text()) == results
    assert results["checkpoint"] == {"run": "mine", "step": 7, "params_sha256": "ab" * 32}
    assert results["tokenizer"]["sha256"] == model.tokenizer.sha256
    assert results["versions"]["choices"] == 2.5 and results["versions"]["rolling"] == 1
    assert results["n-samples"]["rolling"] == {"original": 3, "effective": 3}
    assert "word_perplexity" in said and "acc_norm" in said

    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    choices = [row for row in rows if row["task"] == "choices"]
    best = [int(np.argmax([total for ((total, _),) in row["resps"]])) for row in choices]
    right = [guess == row["answer"] for guess, row in zip(best, CHOICES, strict=True)]
    assert results["results"]["choices"]["acc,none"] == np.mean(right)
    assert 0 < sum(right) < 4
    rolling = [row for row in rows if row["task"] == "rolling"]
    nats = -sum(row["resps"][0][0] for row in rolling)
    size = sum(len(document["text"].encode()) for document in DOCUMENTS)
    found = results["results"]["rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(nats / size / math.log(2))
    written = [row["resps"][0][0] for row in rows if row["task"] == "writing"]
    kwargs = {"until": ["at", "o"], "max_gen_toks": 12, "do_sample": False}
    requests = instances("generate_until", [(row["prompt"], kwargs) for row in PROMPTS])
    assert written == adapter(model).generate_until(requests)


def test_limit_few_shots_and_generation_settings_reach_the_harness(tasks, tmp_path, capsys):
    samples = tmp_path / "samples.jsonl"
    results, _ = results_of(
        capsys, "--tasks", "choices", "writing", "--include-path", tasks, "--limit", 3,
        "--num-fewshot", 1, "--gen-kwargs", "max_gen_toks=3", "--samples", samples,
    )  # fmt: skip
    assert {name: n["effective"] for name, n in results["n-samples"].items()} == {
        "choices": 3, "writing": 3
    }  # fmt: skip
    assert results["n-shot"] == {"choices": 1, "writing": 1}
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert all(len(row["resps"][0][0]) <= 9 for row in rows if row["task"] == "writing")
    contexts = [row["arguments"][0][0] for row in rows if row["task"] == "choices"]
    assert all("\n\n" in context for context in contexts)
    assert results["settings"]["limit"] == 3 and results["settings"]["num_fewshot"] == 1


def test_kept_answers_are_found_again_and_not_computed(tasks, tmp_path, capsys, monkeypatch):
    arguments = ("--tasks", "choices", "--include-path", tasks, "--cache", tmp_path / "cache")
    first, _ = results_of(capsys, *arguments)
    monkeypatch.setattr(HarnessModel, "_score", lambda *_: pytest.fail("computed again"))
    again, _ = results_of(capsys, *arguments)
    assert again["results"] == first["results"]


@pytest.fixture
def own_tasks_only(monkeypatch):
    """Not the harness's 13,000 files, which take ten seconds to read."""

    def manager(include_path, include_defaults=False):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("llm.interop.lm_eval.TaskManager", manager)


@pytest.mark.usefixtures("own_tasks_only")
def test_an_unknown_task_is_answered_with_the_nearest_names(tasks, capsys):
    assert run("--tasks", "choises", "--include-path", tasks) == 2
    assert "did you mean 'choices'?" in capsys.readouterr().err
    assert run("--tasks", "list", "--include-path", tasks) == 0
    assert capsys.readouterr().out.split() == sorted(TASKS)


@pytest.mark.usefixtures("own_tasks_only")
def test_data_that_are_nowhere_are_named_with_the_way_without_a_network(tmp_path, capsys):
    common = "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_target: text\n"
    (tmp_path / "a.yaml").write_text(f"task: far\ndataset_path: some/where\n{common}")
    missing = tmp_path / "missing.jsonl"
    files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {missing}}}}}\n"
    (tmp_path / "b.yaml").write_text(f"task: gone\n{files}{common}")
    assert run("--tasks", "far", "--include-path", tmp_path) == 3
    said = capsys.readouterr().err
    assert "'far' (some/where)" in said and "load_dataset('some/where')" in said
    assert "HF_HUB_OFFLINE=1" in said
    assert run("--tasks", tmp_path / "b.yaml") == 3
    assert "missing.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--tasks", ","), "names no task"),
        (("--tasks", "x", "--batch-size", "-1"), "--batch-size -1"),
        (("--tasks", "x", "--limit", "0"), "--limit 0"),
        (("--tasks", "x", "--num-fewshot", "-2"), "--num-fewshot -2"),
        (("--tasks", "x", "--gen-kwargs", "max_gen_toks"), "KEY=VALUE"),
        (("--tasks", "x", "--output", "no/such/folder/x.json"), "no/such/folder"),
        (("--tasks", "x", "--include-path", "no/such/tasks"), "no/such/tasks"),
    ],
)
def test_flags_that_cannot_be_used_are_answered_before_any_work(flags, named, capsys):
    assert run(*flags) == 2
    assert named in capsys.readouterr().err


def test_results_replace_a_file_as_a_whole_or_leave_it(tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    output.write_text("before")
    options = argparse.Namespace(output=str(output), samples=None, as_json=False)

    def fails(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(UsageError, match=r"cannot write .*out.json: No space left"):
            _report(options, {"a": 1}, {})
    assert output.read_text() == "before" and list(tmp_path.iterdir()) == [output]
    _report(options, {"a": 1}, {})
    assert json.loads(output.read_text()) == {"a": 1}


def test_a_task_that_cannot_run_here_is_refused_before_any_work(tasks, tmp_path, capsys):
    where = ("--tasks", "writing", "--include-path", tasks)
    assert run(*where, "--gen-kwargs", "max_gen_toks=32") == 2
    assert "task writing: max_gen_toks = 32" in capsys.readouterr().err
    assert run(*where, "--gen-kwargs", "top_k=x") == 2
    assert "task writing: top_k = 'x': expected an integer" in capsys.readouterr().err
    broken = TASKS["choices"].replace("multiple_choice", "many_choices")
    write_task(tmp_path, "broken", broken, CHOICES)
    assert run("--tasks", "broken", "--include-path", tmp_path) == 2
    assert "'broken' cannot be used" in capsys.readouterr().err


def test_without_the_harness_the_message_names_the_extra(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "llm.interop.lm_eval")
    monkeypatch.delattr("llm.interop.lm_eval", raising=False)
    assert run("--tasks", "arc_easy") == 2
    assert "pip install 'glassbox-gpt[eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def hugging_face(model, tmp_path_factory):
    """The harness's own model on the same weights and vocabulary: transformers reads the export,
    and its tokenizer is made from the tiktoken file by transformers' converter."""
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("hugging_face")
    to_hf(MODEL, model.tokenizer.vocab_size, model.params, folder, model.tokenizer.end_of_text)
    return HFLM(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=hugging_face_tokenizer(model.tokenizer),
        batch_size=3,
        device="cpu",
    )


def hugging_face_tokenizer(tokenizer):
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = {token: id_ for id_, token in enumerate(tokenizer.token_table) if token}
    converter = TikTokenConverter(pattern=tokenizer.pattern, extra_special_tokens=[END_OF_TEXT])
    converter.load_tiktoken_bpe = lambda _: ranks
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    fast = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **special)
    assert len(fast) == tokenizer.vocab_size and fast.eos_token_id == tokenizer.end_of_text
    return fast


def test_likelihoods_equal_those_of_the_harness_own_model(model, hugging_face):
    pairs = [*PAIRS, *[(row["question"], c) for row in CHOICES for c in row["choices"]]]
    requests = instances("loglikelihood", pairs)
    ours = adapter(model).loglikelihood(requests)
    theirs = hugging_face.loglikelihood(requests)
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_likelihoods_equal_those_of_the_harness_own_model(model, hugging_face):
    texts = [*(row["text"] for row in DOCUMENTS), CORPUS[:50], CORPUS]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    ours = adapter(model).loglikelihood_rolling(requests)
    theirs = hugging_face.loglikelihood_rolling(requests)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-6)


def test_greedy_text_equals_that_of_the_harness_own_model(model, hugging_face):
    prompts = [*(row["prompt"] for row in PROMPTS[1:]), "學而時習之"]
    whole = {"max_gen_toks": 12, "until": []}
    texts = adapter(model).generate_until(
        instances("generate_until", [(prompt, whole) for prompt in prompts])
    )
    requests = instances(
        "generate_until",
        [(prompt, whole) for prompt in prompts]
        + [
            (prompt, {"max_gen_toks": 12, "until": [text[4:6] or "x"], "do_sample": False})
            for prompt, text in zip(prompts, texts, strict=True)
        ],
    )
    ours = adapter(model, batch_size=4).generate_until(requests)
    assert ours == hugging_face.generate_until(requests)
    assert len(set(texts)) > 2


def test_whole_results_equal_those_of_the_harness_own_model(model, hugging_face, tasks):
    found = []
    for one in (adapter(model), hugging_face):
        loaded = load_tasks(["choices", "rolling", "writing"], [str(tasks)])
        found.append(run_tasks(one, loaded, num_fewshot=1))
    (ours, our_rows), (theirs, their_rows) = found
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
    for task, rows in their_rows.items():
        assert [row["arguments"] for row in our_rows[task]] == [row["arguments"] for row in rows]
    assert ours["versions"] == theirs["versions"]


@pytest.fixture(scope="module")
def completions_client(model, tmp_path_factory):
    """The harness's client of OpenAI's completions, and `python -m llm serve` for it to ask."""
    pytest.importorskip("transformers")
    pytest.importorskip("tenacity")
    pytest.importorskip("uvicorn")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = tmp_path_factory.mktemp("served")
    (folder / "run").mkdir()
    params = {name: np.asarray(array) for name, array in model.params.items()}
    write_run(folder / "run", folder / "run", folder, model.spec, params, model.tokenizer)
    hugging_face_tokenizer(model.tokenizer).save_pretrained(folder / "tokenizer")
    command = [sys.executable, "-m", "llm", "serve", str(folder / "run"), "--port", "0"]
    environment = {**os.environ, "XLA_FLAGS": QUICK_COMPILING}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        for line in server.stderr:
            said += line
            if "serving" in line:
                break
        url = re.search(r"http://\S+", said)
        assert url, said
        # Nobody reads the rest of its pipe while it is small enough to be held.
        yield LocalCompletionsAPI(
            base_url=f"{url[0]}/v1/completions",
            model="run",
            tokenizer=str(folder / "tokenizer"),
            tokenizer_backend="huggingface",
            max_length=CONTEXT,
            batch_size=4,
            max_retries=1,
        )
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.thorough
def test_the_harness_client_of_the_server_gets_the_same_likelihoods(model, completions_client):
    """Of what the client sends whole: it keeps one position free for a token that it ignores."""
    pairs = [(row["question"], c) for row in CHOICES for c in row["choices"]] + PAIRS
    fitting = [p for p in pairs if sum(map(len, split(model, *p))) < CONTEXT]
    assert len(fitting) >= 12
    requests = instances("loglikelihood", fitting)
    ours = adapter(model).loglikelihood(requests)
    theirs = completions_client.loglikelihood(requests)
    np.testing.assert_allclose([a for a, _ in theirs], [a for a, _ in ours], atol=1e-4)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]
    texts = instances("loglikelihood_rolling", [(CORPUS[:25],), ("學而時習之",)])
    np.testing.assert_allclose(
        completions_client.loglikelihood_rolling(texts),
        adapter(model).loglikelihood_rolling(texts),
        atol=1e-4,
    )


def test_the_harness_client_of_the_server_gets_the_same_text(model, completions_client):
    kwargs = [{"max_gen_toks": 9, "until": until} for until in ([], ["hat"], ["5", "\n"])]
    prompts = ["the cat", "and the dog ", CORPUS[:30], "學而"]
    assert max(len(model.tokenizer.encode(prompt)) for prompt in prompts) < CONTEXT - 9
    arguments = [(prompt, given) for prompt in prompts for given in kwargs]
    requests = instances("generate_until", arguments)
    ours = adapter(model, batch_size=4).generate_until(requests)
    assert completions_client.generate_until(requests) == ours
    assert len(set(ours)) > 4
