"""Byte pairs by gigatoken, many times as fast as tiktoken (benchmarks/README.md): the extra `fast`.

It gives the ids that tiktoken gives, so that it is no part of a tokenizer's definition, and shards
made with either are the same. It knows the patterns of the public encodings, and no other.

Source: https://github.com/marcelroed/gigatoken
"""

import base64
import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm.text.tokenizer import Ids, panics_as

# gigatoken's name of a pattern, by the start of the pattern's sha256.
_SCHEMES = {
    "bf51d578af571878": "gpt2",  # r50k_base has it too; p50k_base also, but misses a rank
    "f021c3d976978e62": "cl100k",
    "2d1b8dc11e89af71": "o200k",  # and o200k_harmony
}

# It remembers each distinct word that it met, for good: 6 bytes for each byte of random letters,
# less than 1 for program text. So it is made anew, in 0.1 s, after so many characters.
_RENEWED_AFTER = 2**25

# A version that gives other ids for these is not used.
_PROBE = (
    "Don't  I'LL \t\r\n\n a\u00a0b\u3000c\u2028 x² ½ Ⅷ 12345 ǅa HTTPServer's ſ'ſ e\u0301 ﷺ "
    "學而時習之，不亦說乎？ 👩\u200d👩\u200d👧 //\n\n  <|endoftext|> \x00\x1c" + " " * 70 + "z" * 70
)


def fast_pairs(encoding: Any) -> "FastPairs | None":
    """The same encoding as a `tiktoken.Encoding`, if gigatoken is installed and can be it."""
    with contextlib.suppress(Exception):
        fast = FastPairs(encoding)
        if fast.encode(_PROBE).tolist() == encoding.encode(_PROBE, disallowed_special=()):
            return fast
    return None


class FastPairs:
    """Encodes as an encoding of tiktoken does; several threads may use it.

    Raises:
      Exception: gigatoken is not installed, or cannot be this encoding.
    """

    def __init__(self, encoding: Any):
        self._scheme = _SCHEMES[hashlib.sha256(encoding._pat_str.encode()).hexdigest()[:16]]
        self._ranks: Mapping[bytes, int] = encoding._mergeable_ranks
        self._lock, self._left, self._backend = threading.Lock(), 0, None

    def encode(self, text: str) -> Ids:
        """int32 [n]; the spelling of a special token is ordinary text.

        Raises:
          Exception: it cannot encode the text; tiktoken may, or says why not.
        """
        with panics_as("gigatoken"):
            with self._lock:
                if self._left <= 0:
                    self._backend, self._left = self._made(), _RENEWED_AFTER
                self._left -= len(text)
                backend: Any = self._backend
            return backend.encode(text).view(np.int32)

    def _made(self) -> Any:
        from gigatoken.gigatoken_rs import BPETokenizer

        ranks = sorted(self._ranks.items(), key=lambda item: item[1])
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks)
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(b"".join(lines))
            file.flush()
            return BPETokenizer.from_tiktoken(file.name, self._scheme, None)
