"""lm-evaluation-harness runs its tasks on a model of ours: likelihoods, perplexities, generation.

    (context, continuation)  ->  log P(continuation | context), is it what greedy decoding writes?
    text                     ->  log P(text), read through the harness's rolling windows
    (context, settings)      ->  the text that the model writes next

The numbers come from llm/inference/score.py and decode.py; the conventions are the harness's, as
its Hugging Face model has them, so that results compare: context and continuation are encoded
together, spaces at the end of the context belong to the continuation, and what does not fit the
context is cut from the left. Where nothing stands before a text, an end of text does.

What it is not: the harness's command; that is llm/commands/eval.py. The one file that imports
lm_eval.

Source: https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/models/huggingface.py.
"""

import contextlib
import difflib
import importlib.metadata
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
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
from llm.inference.distribution import Prediction
from llm.inference.filters import Sampling
from llm.inference.score import Scorer
from llm.model.flops import parameter_count
from llm.model.gpt import ModelSpec, Params
from llm.text.tokenizer import Tokenizer

# Texts that are continued together, where nobody says how many: the key/value cache of a model of
# 1.5B parameters and 1024 positions is 0.6 GB for each in float32.
GENERATION_BATCH = 16
# The harness's own default for a task that does not say how much to write.
MAX_GEN_TOKS = 256

# The settings of generation that this decoder has: their types, and what these are to a person.
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "until": ((str, list), "a text or a list of texts"),
    "max_gen_toks": ((int,), "an integer"),
    "max_new_tokens": ((int,), "an integer"),
    "max_tokens": ((int,), "an integer"),
    "max_completion_tokens": ((int,), "an integer"),
    "do_sample": ((bool,), "true or false"),
    "temperature": ((int, float), "a number"),
    "top_k": ((int,), "an integer"),
    "top_p": ((int, float), "a number"),
    "min_p": ((int, float), "a number"),
}

# Settings of other decoders, and the value at which each does nothing.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1, None),
    "length_penalty": (1, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "typical_p": (1, None),
    "early_stopping": (False, None),
    "use_cache": (True, None),
}

# What a person or a program wants of the harness's results; the rest says how this machine is.
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
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How one text is continued, from a task's generation_kwargs.

    stop: strings that end it.
    """

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any], context_length: int, seed: int) -> "Settings":
        """Greedy unless do_sample or a temperature says otherwise.

        Raises:
          UsageError: a setting that this decoder does not have, or a wrong value of one it has.
        """
        default = min(MAX_GEN_TOKS, max(1, context_length // 2))
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(_checked(given), default))
        stop = handle_stop_sequences(kwargs.pop("until"), eos=None)
        max_new_tokens = kwargs.pop("max_gen_toks")
        if not 0 < max_new_tokens < context_length:
            raise UsageError(
                f"max_gen_toks = {max_new_tokens}: expected 1 to {context_length - 1}, so that "
                f"the model's context of {context_length} has room for a prompt; set it with "
                f"--gen-kwargs max_gen_toks={max(1, context_length // 2)}"
            )
        temperature = kwargs.pop("temperature", 1.0)
        # vLLM's -1 keeps all tokens, as 0 does here.
        top_k = max(0, kwargs.pop("top_k", 0))
        sample: dict[str, Any] = {
            "temperature": temperature if kwargs.pop("do_sample") else 0.0,
            "top_k": top_k,
            "seed": seed,
            **{name: kwargs.pop(name) for name in ("top_p", "min_p") if name in kwargs},
        }
        _refuse_unknown(kwargs)
        sampling = Sampling.of(validate({"sample": sample}, where="generation_kwargs").sample)
        return cls(sampling, max_new_tokens, tuple(string for string in stop if string))


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that are null: to Hugging Face too that is as good as absent.

    Raises:
      UsageError: a value of another type, which the harness would take for something or fail at.
    """
    kwargs = {name: v for name, v in given.items() if v is not None or name not in _TYPES}
    for name, (types, expected) in _TYPES.items():
        if name not in kwargs:
            continue
        value = kwargs[name]
        texts = value if type(value) is list else []
        if type(value) not in types or not all(isinstance(text, str) for text in texts):
            raise UsageError(
                f"{name} = {value!r}: expected {expected}; correct it in the task or with "
                f"--gen-kwargs {name}=VALUE"
            )
    return kwargs


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        neutral = _WITHOUT_EFFECT.get(name)
        if neutral is None or value not in neutral:
            remedy = f"set --gen-kwargs {name}={neutral[0]}" if neutral else "leave it out"
            raise UsageError(
                f"the task asks for {name} = {value!r}, which this decoder does not have (it has "
                f"until, max_gen_toks, do_sample, temperature, top_k, top_p and min_p); {remedy}, "
                "knowing that the result then compares with no other"
            )


class HarnessModel(TemplateLM):
    """One of our models, as the harness asks it.

    Args:
      batch_size: texts computed together; 0: as many as suit the device.
      seed: sample i of a task that draws is a function of it and i.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        tokenizer: Tokenizer,
        batch_size: int = 0,
        seed: int = DEFAULT_OTHER_SEED,
    ):
        super().__init__()
        self.max_length = spec.config.context_length
        self.seed = seed
        self._spec, self._params, self._tokenizer = spec, params, tokenizer
        self._batch_size = batch_size
        self._scorer = Scorer(spec, params)

    @property
    def eot_token_id(self) -> int:
        """The end of text; where the tokenizer has none, what stands in its place."""
        return self.prefix_token_id

    @cached_property
    def prefix_token_id(self) -> int:  # type: ignore[override]
        """What stands before a text that has nothing before it, as in llm/inference/decode.py."""
        return int(encode_prompt(self._tokenizer, "")[0])

    @property
    def tokenizer_name(self) -> str:
        return f"{self._tokenizer.name}-{self._tokenizer.sha256[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; the spelling of a special token is ordinary text."""
        return self._tokenizer.encode(string).tolist()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {
            "model_num_parameters": parameter_count(self._spec),
            "model_dtype": self._spec.compute_dtype,
        }

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log P(continuation | context) in nats, whether greedy decoding writes it) of each."""
        encoded = []
        for request in requests:
            with _named(request):
                encoded.append((request.args, *self._encode_request(*request.args)))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log P(text) in nats; each token is predicted once, in the harness's windows."""
        windows: list[Encoded] = []
        counts = []
        for request in requests:
            with _named(request):
                of_text = list(self._rolling_windows(request.args[0]))
            windows += of_text
            counts.append(len(of_text))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(math.fsum(next(answers)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, without the stop string."""
        jobs = [self._job(index, request) for index, request in enumerate(requests)]
        texts = [""] * len(jobs)
        # Rows of one batch should be alike: the longest prompt decides for all.
        order = sorted(range(len(jobs)), key=lambda index: -len(jobs[index].prompt))
        with tqdm(total=len(jobs), desc="Generating", disable=disable_tqdm or None) as bar:
            for rows in _batches(order, self._batch_size or GENERATION_BATCH):
                for progress in self._decoder.generate([jobs[index] for index in rows]):
                    written = [t.text for t in progress.tokens if t.phase == "generated"]
                    texts[rows[progress.row]] += "".join(written)
                for index in rows:
                    args = requests[index].args
                    self.cache_hook.add_partial("generate_until", args, texts[index])
                bar.update(len(rows))
        return texts

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder.create(self._spec, self._params, self._tokenizer)

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's `_encode_pair`, for contexts of nothing or of spaces too."""
        if not context.strip():
            return [self.prefix_token_id], self.tok_encode(context + continuation)
        before, after = self._encode_pair(context, continuation)
        if continuation and not after:
            # One token spans the whole of it and the end of the context: apart, each has its own.
            return self.tok_encode(context), self.tok_encode(continuation)
        return before, after

    def _rolling_windows(self, text: str) -> Iterator[Encoded]:
        ids = self.tok_encode(text)
        if not ids:
            return
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        for window in windows:
            yield None, *make_disjoint_window(window)

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers = []
        texts = (self._fitting(context, continuation) for _, context, continuation in requests)
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm or None) as bar:
            for request, predictions in zip(requests, self._score(texts), strict=True):
                key, _, continuation = request
                answer = _answer(predictions[len(predictions) - len(continuation) :])
                answers.append(answer)
                if key is not None:  # windows of a text are not requests
                    self.cache_hook.add_partial("loglikelihood", key, answer)
                bar.update()
        return answers

    def _fitting(self, context: list[int], continuation: list[int]) -> list[int]:
        """The last tokens that the model can read at once. A continuation longer than that is
        kept whole, with one token before it, and the Scorer reads it through windows."""
        return (context + continuation)[-(max(self.max_length, len(continuation)) + 1) :]

    def _score(self, texts: Iterable[list[int]]) -> Iterator[list[Prediction | None]]:
        if not self._batch_size:
            yield from self._scorer.score(texts)
            return
        for part in _batches(texts, self._batch_size):
            yield from self._scorer.score(part)

    def _job(self, index: int, request: Instance) -> Request:
        with _named(request):
            context, given = request.args
            settings = Settings.of(given, self.max_length, self.seed)
            prompt = encode_prompt(self._tokenizer, context)
            return Request(
                prompt[-(self.max_length - settings.max_new_tokens) :],
                settings.sampling,
                index=index,
                max_new_tokens=settings.max_new_tokens,
                stop=settings.stop,
            )


def _answer(predictions: Sequence[Prediction | None]) -> tuple[float, bool]:
    of_continuation = [prediction for prediction in predictions if prediction is not None]
    assert len(of_continuation) == len(predictions), "the context has at least one token"
    total = math.fsum(prediction.logprob for prediction in of_continuation)
    return total, all(prediction.rank == 1 for prediction in of_continuation)


@contextlib.contextmanager
def _named(request: Instance) -> Iterator[None]:
    """A message about a request says of which task and document it is."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"task {request.task_name}, document {request.doc_id}: {error}") from None


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    part: list[T] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness with their data.

    parts: groups, and tasks that are in none of them.
    leaves: name -> task, of all there are.
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
    manager = _manager(names, include)
    matches = [match for name in names for match in _matches(manager, name)]
    parts: dict[str, Any] = {}
    leaves: dict[str, Any] = {}
    for name in dict.fromkeys(matches):
        loaded = _load(manager, name)
        groups = loaded.get("groups", {})
        children = {child for group in loaded.get("group_map", {}).values() for child in group}
        top = {**groups, **loaded["tasks"]}
        parts |= {key: part for key, part in top.items() if key not in children}
        leaves |= loaded["tasks"]
    return Tasks(manager, list(parts.values()), leaves)


def task_names(include: Sequence[str] = ()) -> list[str]:
    """Every task, group and tag."""
    return list(_manager((), include).all_tasks)


def _manager(names: Sequence[str], include: Sequence[str]) -> TaskManager:
    """All tasks, or those of `include` alone where they hold every name: to read the harness's
    13,000 files takes ten seconds (2-core EPYC, lm_eval 0.4.13)."""
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
        # Of an unreachable hub, an unknown data set and a missing file alike.
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
    source = described.get("dataset_path")
    call = "load_dataset(PATH, NAME)"
    if source:
        call = f"load_dataset({', '.join(map(repr, filter(None, _dataset(described))))})"
    reason = str(error).split("\n")[0][:300]
    return (
        f"the data of the task {name!r}{f' ({source})' if source else ''} are not on this machine "
        f"and could not be fetched ({reason}). Offline: on a machine with a network run "
        f'`HF_HOME=DIR python -c "from datasets import load_dataset; {call}"`, copy DIR here, and '
        "set HF_HOME to it and HF_HUB_OFFLINE=1; or write a task that reads local files "
        "(docs/evaluation.md)"
    )


def _dataset(described: Mapping[str, Any]) -> tuple[Any, Any]:
    return described.get("dataset_path"), described.get("dataset_name")


@dataclass(frozen=True)
class Options:
    """How tasks are run.

    Attributes:
      num_fewshot: solved examples before each question; None: what the task says.
      limit: documents of each task, or a share of them below 1; None: all.
      gen_kwargs: settings of generation that overrule the tasks'.
      seed: of few-shot examples and of drawing; None: the harness's own.
      cache: where answers are kept and found again, the beginning of a file's name.
      unsafe_code: run tasks that execute what the model writes.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    cache: str | None = None
    unsafe_code: bool = False


def check_tasks(tasks: Tasks, options: Options, context_length: int) -> None:
    """Raise a UsageError for what could only fail later, after hours of work."""
    for name, task in tasks.leaves.items():
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"the task {name!r} needs images or sound; the model reads text")
        if getattr(task, "UNSAFE_CODE", False) and not options.unsafe_code:
            raise UsageError(
                f"the task {name!r} executes code that the model writes; add "
                "--confirm-run-unsafe-code where that may happen"
            )
        if task.OUTPUT_TYPE == "generate_until":
            given = getattr(task.config, "generation_kwargs", None) or {}
            try:
                Settings.of({**given, **options.gen_kwargs}, context_length, seed=0)
            except UsageError as error:
                raise UsageError(f"task {name}: {error}") from None


def evaluate(model: HarnessModel, tasks: Tasks, options: Options) -> tuple[Results, Results]:
    """(results in the harness's own shape, task -> one record of each of its documents).

    Both are strict JSON: what is not finite is None.
    """
    # The harness would fork for its standard errors, which may hang where JAX has threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    seeds = {}
    if options.seed is not None:
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        seeds = dict.fromkeys(names, options.seed)
    # It prints what it does.
    with contextlib.redirect_stdout(sys.stderr), _no_shell_commands():
        found: Any = evaluator.simple_evaluate(
            model,
            tasks=tasks.parts,
            task_manager=tasks.manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            gen_kwargs=dict(options.gen_kwargs) or None,
            use_cache=options.cache,
            confirm_run_unsafe_code=options.unsafe_code,
            **seeds,
        )
    results = {name: _strict(found[name]) for name in _KEPT if name in found}
    results["lm_eval_version"] = importlib.metadata.version("lm_eval")
    return results, _strict(found.get("samples", {}))


@contextlib.contextmanager
def _no_shell_commands() -> Iterator[None]:
    """The harness describes machine and git by shell commands: it takes four seconds where torch
    is, git says "fatal" outside of a repository, and nothing of it is kept."""
    replaced = {"add_env_info": lambda results: None, "get_git_commit_hash": lambda: None}
    before = {name: getattr(evaluator, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(evaluator, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(evaluator, name, function)


def table(results: Results) -> str:
    """The results as the harness prints them."""
    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(parts)


def _strict(value: Any) -> Any:
    """As JSON says it; the harness's results hold functions, arrays and NaN."""
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_strict(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return _strict(handle_non_serializable(value))
