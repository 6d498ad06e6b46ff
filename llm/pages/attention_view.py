"""Attention weights as a page: choose layer and head, point at a token, see where it looks.

    weights[l, n, t, s] = softmax_s(q_t k_s / sqrt(H)),  s <= t

A weight says how much head n of layer l takes from token s when it computes its output for token t.
It does not explain what the model predicts: the values, and every layer after them, decide what
becomes of it (Jain and Wallace 2019, "Attention is not Explanation").
"""

import base64
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm.errors import UsageError
from llm.inference.records import Record
from llm.pages.document import document, plain_text

# L layers  N heads  T query position  S key position
Weights = npt.NDArray[np.float32]

# Each weight is one byte before compression, and a string of JavaScript ends at 512 MB. The limit
# lets GPT-2 124M show its whole context, in a page that opens within seconds.
MOST_PAGE_WEIGHTS = 2**27

_SHOWN = ("token", "bytes", "text", "utf8")


def check_page_size(layers: int, heads: int, tokens: int) -> None:
    """Raise a UsageError for more weights than a browser can show."""
    count = layers * heads * tokens * (tokens + 1) // 2
    if count > MOST_PAGE_WEIGHTS:
        fitting = int((2 * MOST_PAGE_WEIGHTS / (layers * heads)) ** 0.5) - 1
        raise UsageError(
            f"a page of the attention of {layers} layers x {heads} heads over {tokens:,} tokens "
            f"would carry {count:,} weights; expected at most {MOST_PAGE_WEIGHTS:,}, which is "
            f"{fitting:,} tokens: give a shorter text, or take the arrays with `python -m llm "
            "score --attention FILE.npz`"
        )


def attention_page(weights: Weights, tokens: Sequence[Record], *, title: str) -> str:
    """One self-contained HTML document.

    The page carries round(255 sqrt(w)) for every weight on or below the diagonal, compressed. This
    is within 0.004 of the weight, and closer for smaller weights.

    Args:
      weights: float32 [L, N, T, T]; rows sum to one, zero above the diagonal.
      tokens: the T tokens' records; their `token`, `bytes`, `text` and `utf8` are shown.
    Raises:
      UsageError: the weights are too many.
    """
    layers, heads, length, _ = weights.shape
    check_page_size(layers, heads, length)
    packed = base64.b64encode(zlib.compress(_quantised(weights), 9)).decode()
    return document(
        title,
        "attention.html",
        kind="attention",
        scripts=("page.js", "attention.js"),
        data={
            "tokens": [{name: token[name] for name in _SHOWN} for token in tokens],
            "layers": layers,
            "heads": heads,
            "weights": packed,
        },
        layers=layers,
        heads=heads,
        tokens=length,
        plain=plain_text("".join(token["text"] for token in tokens)),
    )


def _quantised(weights: Weights) -> bytes:
    """uint8 [L, N, T (T + 1) / 2]: the rows of the lower triangles, one after the other."""
    rows, columns = np.tril_indices(weights.shape[-1])
    return np.rint(255.0 * np.sqrt(weights[:, :, rows, columns])).astype(np.uint8).tobytes()
