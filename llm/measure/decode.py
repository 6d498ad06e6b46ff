"""Decoding with the key/value cache: seconds a token, and the bytes that a token has to read."""

import copy
import statistics
from typing import Any

import jax

from llm.inference.decode import Decoder, Request, round_up
from llm.inference.records import Sampling
from llm.measure.machine import time_turns
from llm.model.gpt import KVCache
from llm.training.loop import Job
from llm.training.optimizer import make_optimizer
from llm.training.state import create_state

_GREEDY = Sampling(temperature=0.0)


def measure_decoding(
    job: Job, batch_size: int, bandwidth: float, turns: int, tokens: int = 128
) -> dict[str, Any]:
    """Continue a short prompt in `batch_size` rows, with random weights, greedily.

    Args:
      bandwidth: the measured bandwidth of one device, bytes/s.
    Returns:
      seconds_per_token: the time for one token in each row. It is computed from how much longer
        `tokens` tokens take than one, which leaves out the prompt and all that is done once. Null
        if they take no longer, because of the machine's noise or a context of two tokens; then
        tokens_per_second and bandwidth_share are null too.
      bytes_per_token: bytes read for one token in each row: matrices in their compute dtype, the
        most experts of a mixture that the rows can choose, and the cache at its capacity.
      bandwidth_share: the share of the measured bandwidth.
    """
    spec, mesh = job.spec, job.mesh
    state = create_state(spec, make_optimizer(job.config.optimizer), 0, mesh)
    tokenizer = copy.copy(job.corpus.tokenizer)
    tokenizer.end_of_text = None  # random weights may draw it, and the row would end there
    decoder = Decoder.create(spec, state.params, tokenizer)
    prompt = job.batches()[0].tokens[0, :1]
    tokens = min(tokens, spec.config.context_length - len(prompt))

    def seconds_for(length: int) -> float:
        requests = [Request(prompt, _GREEDY, max_new_tokens=length)] * batch_size
        return statistics.median(time_turns(lambda: list(decoder.generate(requests)), turns))

    more = seconds_for(tokens) - seconds_for(1)
    seconds = more / (tokens - 1) if tokens > 1 and more > 0 else None
    capacity = round_up(len(prompt) + tokens, at_least=64)
    cache = jax.eval_shape(lambda: KVCache.create(decoder.spec, batch_size, capacity))
    arrays = (*cache.keys, *cache.values)
    size = weight_bytes(decoder, batch_size) + sum(x.size * x.dtype.itemsize for x in arrays)
    return {
        "batch_size": batch_size,
        "tokens": tokens,
        "seconds_per_token": seconds,
        "tokens_per_second": batch_size / seconds if seconds else None,
        "bytes_per_token": size,
        "bandwidth_share": size / seconds / bandwidth / mesh.size if seconds else None,
    }


def weight_bytes(decoder: Decoder, rows: int) -> int:
    """Bytes of the weights that are read to decode one token in each row.

    Embedding tables do not count, because a token reads one row of them. A row reads K of the E
    experts of a mixture, so min(E, rows x K) of them count.
    """
    config = decoder.spec.config
    read = min(config.n_expert, rows * config.n_expert_active)
    total = 0
    for name, weight in decoder.params.items():
        # A weight or bias of experts has one dimension more than a dense one.
        if ".mlp." in name and weight.ndim == (3 if name.endswith(".weight") else 2):
            total += weight.nbytes * read // config.n_expert
        elif not name.startswith("embed."):
            total += weight.nbytes
    return total
