"""A trained model in Python: the probability of every token of texts, given and drawn.

    lm = llm.load("runs/mine")
    lm.score("It was a bright cold day").logprobs
    lm.generate("def ", max_new_tokens=50, seed=1).text

The numbers are those of the commands: `lm.score(...)` writes the records of `python -m llm score
--probs`, `lm.generate(...)` those of `python sample.py --probs` with the same settings.

What it is not: a server of requests that come one by one (server.py).

    L layers  N heads  T tokens of a text  V vocabulary
"""

import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import jax
import numpy as np

from llm.api.results import Call, Floats, Generation, Results, Score
from llm.config import Config, SamplingConfig, nearest
from llm.errors import UsageError
from llm.inference.decode import Decoder, Request
from llm.inference.numerics import decoding_numerics, numerics_of
from llm.inference.records import DEFAULT_TOP, Numerics, RunRecord, Sampling, TokenRecord
from llm.inference.samples import continued, make_requests, overlay
from llm.inference.score import Scorer
from llm.model.flops import parameter_count
from llm.model.gpt import ModelSpec
from llm.pages.attention import attention_of
from llm.run.open import OpenedModel, open_model
from llm.text.tokenizer import Ids, Tokenizer


class RecordArguments(TypedDict, total=False):
    """What results list.

    Attributes:
      top: alternatives of each token (10).
      watch: token ids that are listed whatever their rank.
    """

    top: int
    watch: Iterable[int]


class ScoringArguments(RecordArguments, total=False):
    """The arguments of `score`.

    Attributes:
      stride: tokens between the windows of a text longer than the context; smaller gives more
        context and takes longer (half of the context).
    """

    stride: int


class SamplingArguments(RecordArguments, total=False):
    """The arguments of `generate` and `stream`; each that is missing is as in the run's `sample`
    section, where `llm.config.SamplingConfig` says what it means and can be.

    Attributes:
      greedy: always the likeliest token, as temperature 0.
      stop: a text, or several, that end a sample where they begin.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    greedy: bool
    stop: str | Iterable[str]


@dataclass(frozen=True, repr=False, eq=False)
class LanguageModel:
    """The model of a run at one of its steps; `llm.load` opens it.

    Attributes:
      opened: the checkpoint in memory, its parameters spread over the devices that it was given.
    """

    opened: OpenedModel

    @classmethod
    def load(
        cls,
        run: str | Path,
        step: int | None = None,
        devices: int | Sequence[jax.Device] | None = None,
    ) -> "LanguageModel":
        """See `llm.load`."""
        if not isinstance(run, str | Path):
            raise UsageError(f"run = {run!r}: expected the path of a run directory")
        checked = None if step is None else _integer("step", step, at_least=0)
        return cls(open_model(run, checked, _devices(devices)))

    @property
    def run(self) -> str:
        """Name of the run."""
        return self.opened.run

    @property
    def step(self) -> int:
        """Updates that the model was trained for."""
        return self.opened.step

    @property
    def config(self) -> Config:
        """All settings of the run."""
        return self.opened.config

    @property
    def spec(self) -> ModelSpec:
        """What the model is made of."""
        return self.opened.spec

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        return self.opened.tokenizer

    @functools.cached_property
    def parameters(self) -> int:
        """How many numbers were trained, as in run.json."""
        return parameter_count(self.spec)

    def __repr__(self) -> str:
        devices = next(iter(self.opened.params.values())).devices()
        platform = next(iter(devices)).platform
        return (
            f"LanguageModel(run={self.run!r}, step={self.step}, {self.parameters:,} parameters, "
            f"context {self.spec.config.context_length:,}, vocabulary {self.spec.vocab_size:,} "
            f"({self.tokenizer.name}), {len(devices)} x {platform}, {self.spec.compute_dtype})"
        )

    def encode(self, text: str) -> Ids:
        """int32 [T] token ids.

        Raises:
          UsageError: the tokenizer has no token for a character.
        """
        return self.tokenizer.encode(_text("text", text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(self._ids("ids", ids))

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self, text: str, **arguments: Unpack[ScoringArguments]
    ) -> Score: ...

    @overload
    def score(
        self, text: Iterable[str], **arguments: Unpack[ScoringArguments]
    ) -> Results[Score]: ...

    def score(
        self, text: str | Iterable[str], **arguments: Unpack[ScoringArguments]
    ) -> Score | Results[Score]:
        """The probability of every token of a text, or of each of several.

        Arguments are those of ScoringArguments: top, watch, stride. A text longer than the context
        is read through windows, and each of its tokens predicted once.

        Raises:
          UsageError: the message says what was found and what was expected.
          NonFiniteError: the model gives no probabilities.
        """
        _check_names("score", arguments, ScoringArguments)
        ids = [self.tokenizer.encode(one) for one in _texts("text", text)]
        listed = self._listed(arguments)
        stride = _integer("stride", arguments.get("stride", 0), at_least=0)
        scorer = Scorer(self.spec, self.opened.params, self.tokenizer, **listed, stride=stride)
        numerics = functools.partial(numerics_of, self.spec, self.opened.params, "teacher_forced")
        call = self._call("Scored by", None, numerics, listed["top"])
        results = Results(Score("length", call, tuple(tokens)) for tokens in scorer.score(ids))
        return results[0] if isinstance(text, str) else results

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: str | None = None,
        *,
        num_samples: None = None,
        **arguments: Unpack[SamplingArguments],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: str | Iterable[str] | None = None,
        *,
        num_samples: int | None = None,
        **arguments: Unpack[SamplingArguments],
    ) -> Results[Generation]: ...

    def generate(
        self,
        prompt: str | Iterable[str] | None = None,
        *,
        num_samples: int | None = None,
        **arguments: Unpack[SamplingArguments],
    ) -> Generation | Results[Generation]:
        """Continue a text, or each of several, with the probability of every token.

        Arguments are those of SamplingArguments: max_new_tokens, temperature, greedy, top_k, top_p,
        min_p, seed, stop, top, watch.

        Args:
          prompt: None: the prompt of the run's `sample` section. An empty prompt starts from an end
            of text.
          num_samples: samples of each prompt, as a list. Without it one prompt gives one result,
            whatever the run's section says.
        Raises:
          UsageError: the message says what was found and what was expected.
          NonFiniteError: the model gives no probabilities.
        """
        count = 1 if num_samples is None else num_samples
        requests, call = self._requests("generate", prompt, arguments, count)
        tokens: list[TokenRecord] = []
        results: Results[Generation] = Results()
        for new in continued(self._decoder, requests):
            tokens += new.tokens
            if new.finish is not None:
                results.append(Generation(new.finish, call, tuple(tokens)))
                tokens = []
        one = num_samples is None and (prompt is None or isinstance(prompt, str))
        return results[0] if one else results

    def stream(
        self, prompt: str | None = None, **arguments: Unpack[SamplingArguments]
    ) -> Generator[TokenRecord, None, Generation]:
        """The drawn tokens of `generate`, each as soon as it is final.

            for token in lm.stream("def "):
                print(token.text, end="", flush=True)

        Wrong arguments are refused at once, not at the first token. The generator returns the whole
        Generation (`result = yield from lm.stream(...)`). It computes no token before it is asked.
        """
        if prompt is not None:
            _text("prompt", prompt)
        requests, call = self._requests("stream", prompt, arguments, 1)

        def drawn() -> Generator[TokenRecord, None, Generation]:
            tokens: list[TokenRecord] = []
            finish = ""
            for new in continued(self._decoder, requests):
                tokens += new.tokens
                finish = new.finish or finish
                for token in new.tokens:
                    if token.phase == "generated":
                        yield token
            return Generation(finish, call, tuple(tokens))

        return drawn()

    def distribution(self, text: str) -> Floats:
        """What the model says of all tokens at every place of a text but the first.

        Returns:
          float32 [T - 1, V] log-probabilities: row t predicts the token at t + 1 from those up to
          t. A text longer than the context is read through windows, as by `score`.
        """
        scorer = Scorer(self.spec, self.opened.params, self.tokenizer)
        return scorer.distributions(self.encode(text))

    def attention(self, text: str) -> Floats:
        """Where each head looks: the weights of one pass over a text.

        Returns:
          float32 [L, N, T, T]: [l, n, t, s] is how much head n of layer l takes from token s when
          it computes its output for token t. Rows sum to one, and are zero for s > t.
        Raises:
          UsageError: the text is longer than the context, or the weights are too many to be held.
        """
        return attention_of(self.spec, self.opened.params, self.encode(text))

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return Decoder.create(self.spec, self.opened.params, self.tokenizer)

    def _call(
        self, doing: str, sampling: Sampling | None, numerics: Callable[[], Numerics], top: int
    ) -> Call:
        def describe() -> RunRecord:
            return RunRecord.of(self.opened.checkpoint, self.tokenizer, sampling, numerics(), top)

        return Call(f"{doing} {self.run}, step {self.step}", describe)

    def _requests(
        self,
        method: str,
        prompt: str | Iterable[str] | None,
        arguments: SamplingArguments,
        num_samples: int,
    ) -> tuple[list[Request], Call]:
        """The arguments of `generate` or `stream`, checked, as requests."""
        _check_names(method, arguments, SamplingArguments)
        names = arguments.keys() & SamplingConfig.model_fields.keys()
        given = {name: _plain(value) for name, value in arguments.items() if name in names}
        greedy = arguments.get("greedy", False)
        if not isinstance(greedy, bool):
            raise UsageError(f"greedy = {greedy!r}: expected True or False")
        if greedy and "temperature" in given:
            raise UsageError(
                f"greedy=True and temperature={given['temperature']!r} say two things; give one"
            )
        if greedy:
            given["temperature"] = 0.0
        given["num_samples"] = _integer("num_samples", num_samples, at_least=1)
        section, listed = self.config.sample, self._listed(arguments)
        settings = overlay(section, given, where=f"the arguments of {method}")
        requests = make_requests(
            settings,
            _texts("prompt", section.prompt if prompt is None else prompt),
            self.tokenizer,
            stop=_texts("stop", arguments.get("stop", ())),
            **listed,
        )
        for request in requests:
            self._decoder.check(request)

        def numerics() -> Numerics:
            return decoding_numerics(self.spec, self.opened.params, self._decoder, requests[0])

        call = self._call("Samples from", Sampling.of(settings), numerics, listed["top"])
        return requests, call

    def _listed(self, arguments: RecordArguments) -> dict[str, Any]:
        """`top` and `watch`, checked."""
        top = _integer("top", arguments.get("top", DEFAULT_TOP), at_least=0)
        return {"top": top, "watch": self._ids("watch", arguments.get("watch", ()))}

    def _ids(self, name: str, ids: Iterable[int]) -> tuple[int, ...]:
        """Token ids of this vocabulary, as plain integers."""
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise UsageError(f"{name} = {ids!r}: expected a list of token ids")
        plain = tuple(_integer(f"{name}[{i}]", id_) for i, id_ in enumerate(ids))
        outside = [id_ for id_ in plain if not 0 <= id_ < self.spec.vocab_size]
        if outside:
            raise UsageError(
                f"{name} has the token id {outside[0]}; ids go from 0 to {self.spec.vocab_size - 1}"
            )
        return plain


def _check_names(method: str, arguments: Mapping[str, Any], known: Any) -> None:
    """Raise a UsageError for an argument that the method does not have."""
    names = [*known.__annotations__, *(["num_samples"] if method == "generate" else [])]
    for name in arguments:
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near}? " if near else ""
            raise UsageError(
                f"{method} has no argument {name!r}; {hint}it takes {', '.join(names)}"
            )


def _plain(value: Any) -> Any:
    """A numpy scalar as a number of Python."""
    return value.item() if isinstance(value, np.generic) else value


def _integer(name: str, value: Any, at_least: int | None = None) -> int:
    plain = _plain(value)
    if type(plain) is not int:
        raise UsageError(f"{name} = {value!r}: expected an integer, found {type(value).__name__}")
    if at_least is not None and plain < at_least:
        raise UsageError(f"{name} = {plain}: expected {at_least} or more")
    return plain


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    kind = type(value).__name__
    if isinstance(value, bytes | bytearray):
        raise UsageError(
            f"{name} is {kind}, expected str: decode it, for example with data.decode('utf-8'), "
            "or, for a model of the 'bytes' tokenizer and data that may not be UTF-8, with "
            "data.decode('utf-8', 'surrogateescape')"
        )
    raise UsageError(f"{name} = {value!r}: expected str, found {kind}")


def _texts(name: str, value: Any) -> list[str]:
    """One text or several, as a list."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray):
        return [_text(f"{name}[{index}]", one) for index, one in enumerate(value)]
    return [_text(name, value)]


def _devices(devices: Any) -> Sequence[jax.Device] | None:
    """The devices that are given, or as many of this machine's as a number says."""
    if devices is None:
        return None
    if isinstance(devices, Sequence) and devices and not isinstance(devices, str):
        wrong = [device for device in devices if not isinstance(device, jax.Device)]
        if wrong:
            raise UsageError(f"devices has {wrong[0]!r}; expected devices of jax.local_devices()")
        return devices
    count, there = _integer("devices", devices, at_least=1), jax.local_devices()
    if count > len(there):
        raise UsageError(
            f"devices = {count}: this machine has {len(there)} ({there[0].platform}); expected at "
            "most as many"
        )
    return there[:count]
