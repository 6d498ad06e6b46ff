"""How the numbers of records are computed, and how far cached decoding is from one whole pass.

In float32 the two agree to 1e-4 nats, and tests hold it. In bfloat16 the bound depends on the
model, so it is measured on this model and machine, and written into the run record.
"""

from typing import Literal

import jax
import msgspec
import numpy as np

from llm.inference.decode import Decoder, Request, TokenIds
from llm.inference.records import Numerics, Sampling
from llm.inference.score import Scorer
from llm.model.gpt import ModelSpec, Params

PROBE_TOKENS = 16


def numerics_of(
    spec: ModelSpec, params: Params, path: Literal["cached", "teacher_forced"]
) -> Numerics:
    """How the numbers are computed.

    Args:
      path: "cached" (decoding with a key/value cache) or "teacher_forced" (whole texts at once).
    """
    weight = next(iter(params.values()))
    platform = next(iter(weight.devices())).platform
    return Numerics(path, str(weight.dtype), spec.compute_dtype, platform, jax.__version__)


def decoding_numerics(
    spec: ModelSpec, params: Params, decoder: Decoder, first: Request
) -> Numerics:
    """`numerics_of` samples, and in another dtype than float32 the distance from one whole pass.

    Args:
      spec, params: the model that is trained and scored.
      decoder: the same model, prepared for decoding.
      first: the first request; the distance is measured on its prompt if it wants probabilities.
    """
    numerics = numerics_of(spec, params, "cached")
    if first.top is None or spec.compute_dtype == "float32":
        return numerics
    distance = cached_minus_full(spec, params, decoder, first.prompt)
    return msgspec.structs.replace(numerics, cached_minus_full_nats=distance)


def cached_minus_full(spec: ModelSpec, params: Params, decoder: Decoder, prompt: TokenIds) -> float:
    """The largest |difference| in nats over a prompt and a greedy continuation of it.

    Arguments as of `decoding_numerics`.
    """
    room = spec.config.context_length - len(prompt)
    request = Request(prompt, Sampling(0.0), max_new_tokens=min(PROBE_TOKENS, room), top=1)
    tokens = [token for progress in decoder.generate([request]) for token in progress.tokens]
    (full,) = Scorer(spec, params, decoder.tokenizer).score([[token.id for token in tokens]])
    cached, whole = (np.array([t.logprob for t in these], float) for these in (tokens, full))
    return float(np.nanmax(np.abs(cached - whole), initial=0.0))  # the first token has none
