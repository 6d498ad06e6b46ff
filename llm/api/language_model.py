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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import jax
import numpy as np

from llm.api.results import Call, Floats, Generation, Results, Score
from llm.config import SamplingConfig
from llm.errors import UsageError
from llm.inference import samples
from llm.inference.decode import Decoder, Request
from llm.inference.numerics import decoding_numerics, numerics_of
from llm.inference.records import DEFAULT_TOP, Numerics, RunRecord, Sampling, TokenRecord
from llm.inference.score import Scorer
from llm.model.flops import parameter_count
from llm.model.sharding import local_devices
from llm.names import nearest
from llm.pages.attention import attention_of
from llm.run.open import OpenedModel, open_model
from llm.text.tokenizer import Ids

# A text, or its token ids.
Text = str | Sequence[int] | Ids


class RecordArguments(TypedDict, total=False):
    """Which alternatives the results list.

    Attributes:
      top: how many alternatives each token lists; 10 by default.
      watch: token ids that are always listed, whatever their rank.
    """

    top: int | None
    watch: Iterable[int] | None


class ScoringArguments(RecordArguments, total=False):
    """The arguments of `score`.

    Attributes:
      stride: tokens between the windows of a text longer than the context; half of the context by
        default. A smaller stride gives tokens more context and takes longer.
    """

    stride: int | None


class SamplingArguments(RecordArguments, total=False):
    """The arguments of `generate` and `stream`. Omitted arguments, and those that are None, default
    to the run's `sample` section; `llm.config.SamplingConfig` says what they mean.

    Attributes:
      greedy: always take the likeliest token, as temperature 0 does.
      stop: a text, or several; a sample ends where one of them begins.
    """

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    greedy: bool | None
    stop: str | Iterable[str] | None


@dataclass(frozen=True, repr=False, eq=False)
class LanguageModel(OpenedModel):
    """The model of a run at one of its steps; `llm.load` opens it.

    Its parameters are spread over the devices that it was given.
    """

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
        return cls(**vars(open_model(run, checked, _devices(devices))))

    @functools.cached_property
    def parameters(self) -> int:
        """The number of trained parameters, as in run.json."""
        return parameter_count(self.spec)

    def __repr__(self) -> str:
        devices = [*next(iter(self.params.values())).devices()]
        return (
            f"LanguageModel(run={self.run!r}, step={self.step}, {self.parameters:,} parameters, "
            f"context {self.spec.config.context_length:,}, vocabulary {self.spec.vocab_size:,} "
            f"({self.tokenizer.name}), {len(devices)} x {devices[0].platform}, "
            f"{self.spec.compute_dtype})"
        )

    def encode(self, text: str, *, special: bool = False) -> Ids:
        """int32 [T] token ids, after a beginning of text if the tokenizer has one.

        Args:
          special: a special token that is written in the text becomes that token; otherwise its
            spelling is text. `score` and `generate` take the ids.
        Raises:
          UsageError: the tokenizer has no token for a character.
        """
        return self.tokenizer.begun(self.tokenizer.encode(_text("text", text), special=special))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(self._ids("ids", ids))

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self, text: Text, **arguments: Unpack[ScoringArguments]
    ) -> Score: ...

    @overload
    def score(
        self, text: Iterable[Text], **arguments: Unpack[ScoringArguments]
    ) -> Results[Score]: ...

    def score(
        self, text: Text | Iterable[Text], **arguments: Unpack[ScoringArguments]
    ) -> Score | Results[Score]:
        """The probability of every token of a text, or of each of several.

        The arguments are those of ScoringArguments: top, watch, stride. A text longer than the
        context is read through windows, and each of its tokens is predicted once. A text may be
        given as its token ids.

        Raises:
          UsageError: the message says what was found and what was expected.
          NonFiniteError: the model gives no probabilities.
        """
        given = _given("score", arguments, ScoringArguments)
        listed = self._listed(given)
        texts, is_one = self._inputs("text", text)
        ids = [self._encoded("text", one) for one in texts]
        stride = _integer("stride", given.get("stride", 0), at_least=0)
        scorer = Scorer(self.spec, self.params, self.tokenizer, **listed, stride=stride)
        numerics = functools.partial(numerics_of, self.spec, self.params, "teacher_forced")
        call = self._call("Scored by", None, numerics, listed["top"])
        results = Results(Score("length", call, tuple(tokens)) for tokens in scorer.score(ids))
        return results[0] if is_one else results

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Text | None = None, **arguments: Unpack[SamplingArguments]
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Text | Iterable[Text] | None = None,
        *,
        num_samples: int | None = None,
        **arguments: Unpack[SamplingArguments],
    ) -> Results[Generation]: ...

    def generate(
        self,
        prompt: Text | Iterable[Text] | None = None,
        *,
        num_samples: int | None = None,
        **arguments: Unpack[SamplingArguments],
    ) -> Generation | Results[Generation]:
        """Continue a text, or each of several, with the probability of every token.

        The arguments are those of SamplingArguments: max_new_tokens, temperature, greedy, top_k,
        top_p, min_p, seed, stop, top, watch.

        Args:
          prompt: a text or its token ids. None means the prompt of the run's `sample` section. An
            empty prompt starts from an end of text.
          num_samples: how many samples of each prompt, which come as a list. Without it one prompt
            gives one result, whatever the run's section says.
        Raises:
          UsageError: the message says what was found and what was expected.
          NonFiniteError: the model gives no probabilities.
        """
        count = 1 if num_samples is None else num_samples
        prompts, is_one = self._prompts(prompt)
        drawn = self._drawn(*self._requests("generate", prompts, arguments, count))
        results = Results(one for one in drawn if isinstance(one, Generation))
        return results[0] if is_one and num_samples is None else results

    def stream(
        self, prompt: Text | None = None, **arguments: Unpack[SamplingArguments]
    ) -> Generator[TokenRecord, None, Generation]:
        """The drawn tokens of `generate`, each as soon as it is final.

            for token in lm.stream("def "):
                print(token.text, end="", flush=True)

        Wrong arguments are refused at once, not at the first token. Each token is computed when it
        is asked for. The generator returns the whole Generation
        (`result = yield from lm.stream(...)`).
        """
        if prompt is not None:
            prompt = self._input("prompt", prompt)
        drawn = self._drawn(*self._requests("stream", self._prompts(prompt)[0], arguments, 1))

        def generated() -> Generator[TokenRecord, None, Generation]:
            while not isinstance(one := next(drawn), Generation):
                if one.phase == "generated":
                    yield one
            return one

        return generated()

    def distribution(self, text: Text) -> Floats:
        """The log-probabilities of all tokens at every place of a text but the first.

        Returns:
          float32 [T - 1, V], nats: row t predicts the token at t + 1 from the tokens up to t. A
          text longer than the context is read through windows, as `score` reads it.
        Raises:
          NonFiniteError: the model gives no probabilities.
        """
        scorer = Scorer(self.spec, self.params, self.tokenizer)
        return scorer.distributions(self._encoded("text", text))

    def attention(self, text: Text) -> Floats:
        """Where each head looks: the weights of one pass over a text.

        Returns:
          float32 [L, N, T, T]: [l, n, t, s] is how much head n of layer l takes from token s when
          it computes its output for token t. Rows sum to one, and are zero for s > t.
        Raises:
          UsageError: the text is longer than the context, or the weights are too many to be held.
          NonFiniteError: the model is not finite.
        """
        return attention_of(self.spec, self.params, self._encoded("text", text))

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return Decoder.create(self.spec, self.params, self.tokenizer)

    def _call(
        self, doing: str, sampling: Sampling | None, numerics: Callable[[], Numerics], top: int
    ) -> Call:
        @functools.cache
        def record() -> RunRecord:
            return RunRecord.of(self.checkpoint, self.tokenizer, sampling, numerics(), top)

        return Call(f"{doing} {self.run}, step {self.step}", record)

    def _requests(
        self,
        method: str,
        prompts: Sequence[Text],
        arguments: SamplingArguments,
        num_samples: int,
    ) -> tuple[list[Request], Call]:
        """The arguments of `generate` or `stream`, checked, as requests."""
        told = _given(method, arguments, SamplingArguments)
        listed = self._listed(told)
        settable = SamplingConfig.model_fields
        given = {name: _plain(value) for name, value in told.items() if name in settable}
        greedy = told.get("greedy", False)
        if not isinstance(greedy, bool):
            raise UsageError(f"greedy = {greedy!r}: expected True or False")
        if greedy and "temperature" in given:
            raise UsageError(
                f"greedy=True and temperature={given['temperature']!r} contradict; give one"
            )
        if greedy:
            given["temperature"] = 0.0
        given["num_samples"] = _integer("num_samples", num_samples, at_least=1)
        where = f"the arguments of {method}"
        settings = samples.overlay(self.config.sample, given, where)
        stop = _texts("stop", told.get("stop", ()))
        requests = samples.make_requests(settings, prompts, self.tokenizer, stop=stop, **listed)
        for request in requests:
            self._decoder.check(request)
        # Without a request there is no record, and nothing asks for the numerics.
        model = (self.spec, self.params, self._decoder)
        numerics = functools.partial(decoding_numerics, *model, *requests[:1])
        call = self._call("Samples from", Sampling.of(settings), numerics, listed["top"])
        return requests, call

    def _drawn(self, requests: list[Request], call: Call) -> Iterator[TokenRecord | Generation]:
        """The tokens of each request, as soon as they are final, then the whole Generation."""
        tokens: list[TokenRecord] = []
        for progress in samples.continued(self._decoder, requests):
            tokens += progress.tokens
            yield from progress.tokens
            if progress.finish is not None:
                yield Generation(progress.finish, call, tuple(tokens))
                tokens = []

    def _prompts(self, prompt: Any) -> tuple[list[str | tuple[int, ...]], bool]:
        """`_inputs` of a prompt, or of that of the run's section."""
        return self._inputs("prompt", self.config.sample.prompt if prompt is None else prompt)

    def _inputs(self, name: str, value: Any) -> tuple[list[str | tuple[int, ...]], bool]:
        """One text or several, as `_input` gives each, and whether it is one."""
        if not _is_list(value):
            return [_text(name, value)], True
        items = list(map(_plain, value))
        if items and all(type(item) is int for item in items):
            return [self._ids(name, items)], True
        return [self._input(f"{name}[{index}]", item) for index, item in enumerate(items)], False

    def _input(self, name: str, value: Any) -> str | tuple[int, ...]:
        """A text, or token ids, checked."""
        inputs, is_one = self._inputs(name, value) if _is_list(value) else ([], False)
        return inputs[0] if is_one else _text(name, value)

    def _encoded(self, name: str, value: Any) -> Ids:
        """The token ids of `_input`."""
        given = self._input(name, value)
        return self.encode(given) if isinstance(given, str) else np.array(given, np.int32)

    def _listed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`top` and `watch`, checked."""
        top = _integer("top", arguments.get("top", DEFAULT_TOP), at_least=0)
        return {"top": top, "watch": self._ids("watch", arguments.get("watch", ()))}

    def _ids(self, name: str, ids: Iterable[int]) -> tuple[int, ...]:
        """Token ids as plain integers, checked to be in the vocabulary."""
        if not _is_list(ids):
            raise UsageError(f"{name} = {ids!r}: expected a list of token ids")
        plain = tuple(map(_plain, ids))
        for id_ in plain:
            if type(id_) is not int or not 0 <= id_ < self.spec.vocab_size:
                last = self.spec.vocab_size - 1
                raise UsageError(f"{name} has the token id {id_!r}; ids go from 0 to {last}")
        return plain


def _given(method: str, arguments: Mapping[str, Any], known: type) -> dict[str, Any]:
    """The arguments that say something, all of which the method has."""
    names = [*known.__annotations__, *(["num_samples"] if method == "generate" else [])]
    given = samples.without_neutral(arguments)
    for name in given:
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near}? " if near else ""
            raise UsageError(
                f"{method} has no argument {name!r}; {hint}it takes {', '.join(names)}"
            )
    return given


def _plain(value: Any) -> Any:
    """A numpy scalar as a Python number; other values as they are."""
    return value.item() if isinstance(value, np.generic) else value


def _integer(name: str, value: Any, at_least: int) -> int:
    plain = _plain(value)
    if type(plain) is not int:
        raise UsageError(f"{name} = {value!r}: expected an integer, found {type(value).__name__}")
    if plain < at_least:
        raise UsageError(f"{name} = {plain}: expected {at_least} or more")
    return plain


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    is_bytes = isinstance(value, bytes | bytearray)
    raise UsageError(
        f"{name} = {value!r:.60}: expected str, found {type(value).__name__}{_DECODE * is_bytes}"
    )


_DECODE = (
    "; decode it, for example with data.decode('utf-8'), or, for a model of the 'bytes' tokenizer "
    "and data that may not be UTF-8, with data.decode('utf-8', 'surrogateescape')"
)


def _texts(name: str, value: Any) -> list[str]:
    """One text or several, as a list."""
    if _is_list(value):
        return [_text(f"{name}[{index}]", one) for index, one in enumerate(value)]
    return [_text(name, value)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray)


def _devices(devices: Any) -> Sequence[jax.Device] | None:
    """The given devices, or the first N of this machine if a number is given."""
    if devices is None:
        return None
    there = local_devices()
    count = _plain(devices)
    if type(count) is int and 1 <= count <= len(there):
        return there[:count]
    is_list = isinstance(devices, Sequence) and not isinstance(devices, str)
    if is_list and devices and all(isinstance(device, jax.Device) for device in devices):
        return devices
    raise UsageError(
        f"devices = {devices!r}: expected a number from 1 to {len(there)}, which is how many "
        f"{there[0].platform} devices this machine has, or a list of devices of jax.local_devices()"
    )
