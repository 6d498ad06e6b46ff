"""lm-evaluation-harness runs its tasks on a model of ours: likelihoods, perplexities, generation.

    (context, continuation)  ->  log P(continuation | context), is it what greedy decoding writes?
    text                     ->  log P(text), read through the harness's rolling windows
    (context, settings)      ->  the text that the model writes next

The numbers come from llm/inference/score.py and decode.py. The conventions are those of the
harness's Hugging Face model, so that results compare: context and continuation are encoded
together, spaces at the end of the context belong to the continuation, and a text that is longer
than the context is cut from the left. If nothing stands before a text, an end of text does.

What it is not: the harness's command; that is llm/commands/eval.py. This is the one file that
imports lm_eval.

Source: https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/models/huggingface.py.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import pydantic
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import chunks, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
    make_table,
)
from tqdm import tqdm

from llm.config import validate
from llm.errors import DataError, UsageError
from llm.inference.decode import Decoder, Request, encode_prompt
from llm.inference.records import Sampling, TokenRecord
from llm.inference.samples import NEUTRAL, without_neutral
from llm.inference.score import Scorer
from llm.model.gpt import ModelSpec, Params
from llm.text.tokenizer import Tokenizer

# Texts that are continued together if nobody says how many: the key/value cache of a model of
# 1.5B parameters and 1024 positions is 0.6 GB for each in float32.
GENERATION_BATCH = 16
# The harness's own default for a task that does not say how much to write.
MAX_GEN_TOKS = 256

# The parts of the harness's results that a person or a program wants; the rest describes the
# machine.
_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "configs",
)

# The harness's: ((context, continuation), ids of the context, ids of the continuation).
Encoded = tuple[Any, list[int], list[int]]
Results = dict[str, Any]


def _is(expected: str) -> Any:
    return pydantic.Field(None, description=expected)


class _GenerationKwargs(pydantic.BaseModel, strict=True, extra="allow"):
    """The settings of generation that this decoder has. Null is as good as absent, as it is to
    Hugging Face. The harness itself takes a value of a wrong type for another, or fails at it."""

    until: str | list[str] | None = _is("a text or a list of texts")
    max_gen_toks: int | None = _is("an integer")
    max_new_tokens: int | None = _is("an integer")
    max_tokens: int | None = _is("an integer")
    max_completion_tokens: int | None = _is("an integer")
    do_sample: bool | None = _is("true or false")
    temperature: float | None = _is("a number")
    top_k: int | None = _is("an integer")
    top_p: float | None = _is("a number")
    min_p: float | None = _is("a number")


def request_of(given: Mapping[str, Any], context_length: int, seed: int) -> Request:
    """A request without a prompt, from a task's generation_kwargs.

    It is greedy unless do_sample or a temperature says otherwise.

    Raises:
      UsageError: a setting that this decoder does not have, or a wrong value of one that it has.
    """
    try:
        known = _GenerationKwargs.model_validate(given).model_dump(exclude_none=True)
    except pydantic.ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise UsageError(
            f"{name} = {given[name]!r}: expected {_GenerationKwargs.model_fields[name].description}"
            f"; correct it in the task or with --gen-kwargs {name}=VALUE"
        ) from None
    default = min(MAX_GEN_TOKS, max(1, context_length // 2))
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(known, default))
    stop, max_new_tokens = kwargs.pop("until"), kwargs.pop("max_gen_toks")
    if not 0 < max_new_tokens < context_length:
        raise UsageError(
            f"max_gen_toks = {max_new_tokens}: expected 1 to {context_length - 1}, so that "
            f"the model's context of {context_length} has room for a prompt; set it with "
            f"--gen-kwargs max_gen_toks={max(1, context_length // 2)}"
        )
    temperature = kwargs.pop("temperature", 1.0)
    sample: dict[str, Any] = {
        "temperature": temperature if kwargs.pop("do_sample") else 0.0,
        "top_k": kwargs.pop("top_k", 0),
        "seed": seed,
        **{name: kwargs.pop(name) for name in ("top_p", "min_p") if name in kwargs},
    }
    for name, value in without_neutral(kwargs).items():
        remedy = "leave it out"
        if name in NEUTRAL:
            remedy = f"set --gen-kwargs {name}={NEUTRAL[name]}"
        raise UsageError(
            f"the task asks for {name} = {value!r}, which this decoder does not have (it has "
            f"until, max_gen_toks, do_sample, temperature, top_k, top_p and min_p); {remedy}, "
            "knowing that the result then compares with no other"
        )
    return Request(
        prompt=(),
        sampling=Sampling.of(validate({"sample": sample}, where="generation_kwargs").sample),
        max_new_tokens=max_new_tokens,
        stop=tuple(string for string in stop if string),
    )


class HarnessModel(TemplateLM):
    """One of our models, as the harness asks it.

    Args:
      batch_size: texts computed together; 0: as many as suit the device.
      seed: sample i of a task that draws is a function of the seed and i; None: the harness's.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        tokenizer: Tokenizer,
        batch_size: int = 0,
        seed: int | None = None,
    ):
        super().__init__()
        self.max_length = spec.config.context_length
        self.seed = DEFAULT_OTHER_SEED if seed is None else seed
        self._spec, self._params, self._tokenizer = spec, params, tokenizer
        self._batch_size = batch_size
        self._scorer = Scorer(spec, params, tokenizer)

    @cached_property
    def eot_token_id(self) -> int:  # type: ignore[override]
        """The id that stands before a text that has nothing before it: the end of text, or its
        substitute (encode_prompt). The harness's prefix_token_id is the same."""
        return int(encode_prompt(self._tokenizer, "")[0])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; the spelling of a special token is ordinary text."""
        return self._tokenizer.encode(string).tolist()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each request, log P(continuation | context) in nats, and whether greedy decoding
        writes the continuation."""
        encoded = []
        for request in requests:
            with _named(request):
                encoded.append((request.args, *self._encode_request(*request.args)))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log P(text) in nats; each token is predicted once, in the harness's windows."""
        windows: list[list[Encoded]] = []
        for request in requests:
            with _named(request):
                windows.append(self._rolling_windows(request.args[0]))
        flat = list(itertools.chain.from_iterable(windows))
        answers = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        totals = []
        for request, of_text in zip(requests, windows, strict=True):
            totals.append(math.fsum(next(answers)[0] for _ in of_text))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, without the stop string."""
        jobs = [self._job(index, request) for index, request in enumerate(requests)]
        texts = [""] * len(jobs)
        # Rows of one batch should be alike: the longest prompt decides for all.
        order = sorted(range(len(jobs)), key=lambda index: -len(jobs[index].prompt))
        bar = tqdm(order, desc="Generating", disable=disable_tqdm or None)
        for rows in chunks(bar, self._batch_size or GENERATION_BATCH):
            for new in self._decoder.generate([jobs[index] for index in rows]):
                written = [token.text for token in new.tokens if token.phase == "generated"]
                texts[rows[new.row]] += "".join(written)
            for index in rows:
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder.create(self._spec, self._params, self._tokenizer)

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's `_encode_pair`, for contexts of nothing or of spaces too."""
        if not context.strip():
            return [self.eot_token_id], self.tok_encode(context + continuation)
        before, after = self._encode_pair(context, continuation)
        if continuation and not after:
            # One token spans the continuation and the end of the context: encode them apart.
            before, after = self.tok_encode(context), self.tok_encode(continuation)
        return self._tokenizer.begun(before).tolist(), after

    def _rolling_windows(self, text: str) -> list[Encoded]:
        ids = self.tok_encode(text)
        windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers = []
        bar = tqdm(requests, desc="Scoring", disable=disable_tqdm or None)
        for (request, *_), tokens in zip(bar, self._score(requests), strict=True):
            total = math.fsum(token.logprob for token in tokens if token.logprob is not None)
            answers.append((total, all(token.rank == 1 for token in tokens)))
            if request is not None:  # windows of a text are not requests
                self.cache_hook.add_partial("loglikelihood", request, answers[-1])
        return answers

    def _score(self, requests: Sequence[Encoded]) -> Iterator[list[TokenRecord]]:
        """The records of each continuation.

        A text that is too long for the context is cut from the left. A continuation that is too
        long by itself is kept whole, with one token before it: the Scorer reads it through windows.
        """
        texts = (
            (before + after)[-(max(self.max_length, len(after)) + 1) :]
            for _, before, after in requests
        )
        sizes = iter([len(after) for _, _, after in requests])
        for part in chunks(texts, self._batch_size):  # 0: all of them
            for tokens in self._scorer.score(part):
                scored = [token for token in tokens if token.logprob is not None]
                size = next(sizes)
                assert size <= len(scored), "the context has at least one token"
                yield scored[len(scored) - size :]

    def _job(self, index: int, request: Instance) -> Request:
        with _named(request):
            context, given = request.args
            job = request_of(given, self.max_length, self.seed)
            prompt = encode_prompt(self._tokenizer, context)
            prompt = prompt[-(self.max_length - job.max_new_tokens) :]
            return dataclasses.replace(job, prompt=prompt, index=index)


@contextlib.contextmanager
def _named(request: Instance) -> Iterator[None]:
    """Messages about a request name its task and document."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"task {request.task_name}, document {request.doc_id}: {error}") from None


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness with their data.

    Attributes:
      parts: groups, and the tasks that are in none of them.
      leaves: name -> task, for every task.
    """

    manager: TaskManager
    parts: list[Any]
    leaves: dict[str, Any]


def load_tasks(names: Sequence[str], include: Sequence[str] = ()) -> Tasks:
    """The tasks, groups and tags of these names, patterns (arc_*) and YAML files.

    Args:
      include: folders that hold more tasks. A task may bring code of its own, which runs.
    Raises:
      UsageError: no such task, or one that cannot be used here.
      DataError: its data are neither on this machine nor within reach.
    """
    manager = task_manager(names, include)
    matches = [match for name in names for match in _matches(manager, name)]
    parts: dict[str, Any] = {}
    leaves: dict[str, Any] = {}
    for name in dict.fromkeys(matches):
        loaded = _load(manager, name)
        children = {child for group in loaded["group_map"].values() for child in group}
        top = {**loaded["groups"], **loaded["tasks"]}
        parts |= {key: part for key, part in top.items() if key not in children}
        leaves |= loaded["tasks"]
    return Tasks(manager, list(parts.values()), leaves)


def task_manager(names: Sequence[str] = (), include: Sequence[str] = ()) -> TaskManager:
    """All tasks, groups and tags, or only those of the folders in `include` if they are enough: the
    harness's own are thousands of files, and take long to read."""
    missing = [folder for folder in include if not Path(folder).is_dir()]
    if missing:
        raise UsageError(f"--include-path {missing[0]}: there is no such folder")
    if include and names:
        own = TaskManager(include_path=list(include), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=list(include) or None)


def _matches(manager: TaskManager, name: str) -> list[str]:
    is_file = Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()
    if is_file or name in manager.all_tasks:
        return [name]
    if matches := manager.match_tasks([name]):
        return matches
    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UsageError(
        f"there is no task {name!r} among the {len(manager.all_tasks)} of lm_eval and of "
        f"--include-path; {hint}`--tasks list` prints all names"
    )


def _load(manager: TaskManager, name: str) -> Any:
    try:
        return manager.load([name])
    except ImportError as error:
        raise UsageError(f"the task {name!r} needs a package that is not here: {error}") from None
    except Exception as error:
        # An unreachable hub, an unknown data set and a missing file have no class in common.
        if isinstance(error, OSError) or type(error).__module__.startswith("datasets"):
            raise DataError(_no_data(manager, name, error)) from None
        if isinstance(error, ValueError | KeyError | TypeError | AssertionError):
            raise UsageError(
                f"the task {name!r} cannot be used: {type(error).__name__}: {error}"
            ) from None
        raise


def _no_data(manager: TaskManager, name: str, error: Exception) -> str:
    entry = manager.task_index.get(name)
    described = (entry.cfg if entry else None) or {}
    source = [part for key in ("path", "name") if (part := described.get(f"dataset_{key}"))]
    call = f"load_dataset({', '.join(map(repr, source)) or 'PATH, NAME'})"
    reason = str(error).split("\n")[0][:300]
    return (
        f"the data of the task {name!r}{f' ({source[0]})' if source else ''} are not on this "
        f"machine and could not be fetched ({reason}). Offline: on a machine with a network run "
        f'`HF_HOME=DIR python -c "from datasets import load_dataset; {call}"`, copy DIR here, and '
        "set HF_HOME to it and HF_HUB_OFFLINE=1; or write a task that reads local files "
        "(docs/evaluation.md)"
    )


def check_tasks(
    tasks: Tasks, context_length: int, gen_kwargs: Mapping[str, Any], unsafe_code: bool
) -> None:
    """Raise a UsageError for what could only fail later, after hours of work.

    Args:
      gen_kwargs: settings of generation that overrule the tasks'.
      unsafe_code: whether tasks may execute what the model writes.
    """
    for name, task in tasks.leaves.items():
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"the task {name!r} needs images or sound; the model reads text")
        if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
            raise UsageError(
                f"the task {name!r} executes code that the model writes; add "
                "--confirm-run-unsafe-code if that may happen here"
            )
        if task.OUTPUT_TYPE == "generate_until":
            given = getattr(task.config, "generation_kwargs", None) or {}
            try:
                request_of({**given, **gen_kwargs}, context_length, seed=0)
            except UsageError as error:
                raise UsageError(f"task {name}: {error}") from None


def run_tasks(
    model: HarnessModel, tasks: Tasks, seed: int | None = None, **settings: Any
) -> tuple[Results, Results]:
    """(results in the harness's own shape, task -> one record of each of its documents).

    Both are strict JSON: a number that is not finite is None.

    Args:
      seed: of few-shot examples and of the harness's own drawing; None: the harness's.
      settings: for lm_eval's simple_evaluate: num_fewshot, limit, gen_kwargs, use_cache, ...
    """
    # The harness would fork for its standard errors, which may hang if JAX has threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if seed is not None:
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        settings |= dict.fromkeys(names, seed)
    # The harness asks the shell about the machine and git, which is slow and of no use here.
    without_shell = mock.patch.multiple(
        evaluator, add_env_info=lambda results: None, get_git_commit_hash=lambda: None
    )
    # It prints what it does.
    with contextlib.redirect_stdout(sys.stderr), without_shell:
        found: Any = evaluator.simple_evaluate(
            model, tasks=tasks.parts, task_manager=tasks.manager, **settings
        )
    results = {name: _strict(found[name]) for name in _KEPT if name in found}
    results["lm_eval_version"] = importlib.metadata.version("lm_eval")
    return results, _strict(found.get("samples", {}))


def table(results: Results) -> str:
    """The results as the harness prints them."""
    columns = ["results", "groups"] if results.get("groups") else ["results"]
    return "\n".join(make_table(results, column) for column in columns)


def _strict(value: Any) -> Any:
    """The value as strict JSON has it: the harness's results hold functions, arrays and NaN."""

    def plain(value: Any) -> Any:
        if callable(value):
            return getattr(value, "__name__", type(value).__name__)
        return handle_non_serializable(value)

    return json.loads(json.dumps(value, default=plain), parse_constant=lambda _: None)
