"""Decoding with the key/value cache: seconds a token, and the bytes it has to read for one."""

import copy
from typing import Any

import jax

from llm.inference.decode import Decoder, Request, round_up
from llm.inference.filters import Sampling
from llm.measure.timing import time_turns
from llm.measure.workload import Workload
from llm.model.gpt import KVCache
from llm.training.optimizer import make_optimizer
from llm.training.state import create_state

_GREEDY = Sampling(temperature=0.0)


def measure_decoding(
    workload: Workload, batch_size: int, bandwidth: float, turns: int, tokens: int = 128
) -> dict[str, Any]:
    """Continue a short prompt in `batch_size` rows, with random weights, greedily.

    Args:
      bandwidth: measured, bytes/s.
    Returns:
      seconds_per_token: of one token in each row: what `tokens` take more than one does, so that
        the prompt's share and what is done once stay out; null where that is not more, by the
        machine's noise or for a context of two tokens. So are tokens_per_second and
        bandwidth_share.
      bytes_per_token: read for it: matrices in their compute dtype, of a mixture's experts those
        that the rows choose at most, and the cache at its capacity.
      bandwidth_share: of the measured bandwidth.
    """
    spec, mesh = workload.spec, workload.mesh
    state = create_state(spec, make_optimizer(workload.config.optimizer), 0, mesh)
    tokenizer = copy.copy(workload.corpus.tokenizer)
    tokenizer.end_of_text = None  # random weights may well draw it, and the rows would end there
    decoder = Decoder.create(spec, state.params, tokenizer)
    prompt = workload.tokens()[0, :1]
    tokens = min(tokens, spec.config.context_length - len(prompt))

    def continued(length: int) -> None:
        request = Request(prompt, _GREEDY, max_new_tokens=length)
        for _ in decoder.generate([request] * batch_size):
            pass

    long = time_turns(lambda: continued(tokens), turns)
    short = time_turns(lambda: continued(1), turns)
    more = long.median - short.median
    seconds = more / (tokens - 1) if tokens > 1 and more > 0 else None
    capacity = round_up(len(prompt) + tokens, at_least=64)
    size = weight_bytes(decoder, batch_size) + cache_bytes(decoder, batch_size, capacity)
    return {
        "batch_size": batch_size,
        "tokens": tokens,
        "seconds_per_token": seconds,
        "tokens_per_second": batch_size / seconds if seconds else None,
        "bytes_per_token": size,
        "bandwidth_share": size / seconds / bandwidth / mesh.size if seconds else None,
    }


def weight_bytes(decoder: Decoder, rows: int) -> int:
    """Of all weights that one token of each row reads whole; of the embeddings it reads a row.

    Of a mixture's E experts, K are read for one row, and at most K times the rows for several.
    """
    config = decoder.spec.config
    read = min(config.n_expert, rows * config.n_expert_active)
    total = 0
    for name, weight in decoder.params.items():
        if is_of_experts(name, weight):
            total += weight.nbytes * read // config.n_expert
        elif not name.startswith("embed."):
            total += weight.nbytes
    return total


def is_of_experts(name: str, weight: jax.Array) -> bool:
    """Whether this is one weight or bias of each expert: dense ones have a dimension less."""
    return ".mlp." in name and weight.ndim == (3 if name.endswith(".weight") else 2)


def cache_bytes(decoder: Decoder, batch_size: int, capacity: int) -> int:
    """Of the keys and values of all layers, whether filled yet or not."""
    cache = jax.eval_shape(lambda: KVCache.create(decoder.spec, batch_size, capacity))
    return sum(part.size * part.dtype.itemsize for part in (*cache.keys, *cache.values))
