"""How far cached decoding is from one pass over the whole text, measured on this model and machine.

In float32 the two agree to 1e-4 nats, and tests hold it. In bfloat16 the bound depends on the
model, so it is measured and written into the run record.
"""

from llm.inference.decode import Decoder, Request, TokenIds
from llm.inference.filters import Sampling
from llm.inference.score import Scorer
from llm.model.gpt import ModelSpec, Params

PROBE_TOKENS = 16


def cached_minus_full(spec: ModelSpec, params: Params, decoder: Decoder, prompt: TokenIds) -> float:
    """The largest |difference| in nats over a prompt and a greedy continuation of it.

    Args:
      spec, params: the model that is trained and scored.
      decoder: the same model, prepared for decoding.
    """
    room = spec.config.context_length - len(prompt)
    request = Request(prompt, Sampling(0.0), max_new_tokens=min(PROBE_TOKENS, room), top=1)
    tokens = [token for progress in decoder.generate([request]) for token in progress.tokens]
    (full,) = Scorer(spec, params).score([[token.id for token in tokens]])
    pairs = zip(tokens[1:], full[1:], strict=True)
    return max(
        (
            abs(token.prediction.logprob - other.logprob)
            for token, other in pairs
            if token.prediction and other
        ),
        default=0.0,
    )
