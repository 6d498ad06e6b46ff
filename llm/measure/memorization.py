"""Whether a model repeats its training text: extraction, exposure of canaries, membership.

A window is PREFIX tokens that a model is given and SUFFIX tokens that it may know by heart.

    verbatim      greedy decoding from the prefix writes the suffix: each of its tokens is the
                  likeliest after those before it
    extractable   the suffix is among n draws with probability p or more, if P is the probability
                  of the whole suffix:  1 - (1 - P)^n >= p
    exposure      log2(|R| + 1) - log2(rank of the canary among R, random texts of its form)
    membership    how well the loss, or the mean of the least likely tokens (min-k %), tells windows
                  of the training text from held-out ones

Sources: Carlini et al. 2019, "The Secret Sharer" (exposure); Carlini et al. 2023, "Quantifying
Memorization Across Neural Language Models" (verbatim, by occurrences); Hayes et al. 2025,
"Measuring memorization in language models via probabilistic extraction" (n, p); Shi et al. 2024,
"Detecting Pretraining Data from Large Language Models" (min-k %).
"""

import math
import string
from typing import Any, NamedTuple

import numpy as np

from llm.errors import UsageError
from llm.inference.score import Scorer
from llm.text.splits import TokenSplit
from llm.text.tokenizer import Tokenizer

PREFIX = 50
SUFFIX = 50
# (n, p): draws, and the probability that one of them is the suffix.
DRAWS = ((1, 0.5), (10, 0.5), (100, 0.5), (1000, 0.5), (1000, 0.9))
# Texts that a canary is ranked among.
RIVALS = 1000
# Windows are drawn anew until none holds an end of text, this many times at most.
_ATTEMPTS = 50
_CHUNK = 2**22


class Predictions(NamedTuple):
    """What a model says of the tokens of windows but their first: [n, PREFIX + SUFFIX - 1].

    ranks: int, from 1. logprobs: float64, nats.
    """

    ranks: np.ndarray
    logprobs: np.ndarray

    @property
    def of_suffix(self) -> np.ndarray:
        """float64 [n]: the log-probability of each whole suffix, given the prefix."""
        return self.logprobs[:, -SUFFIX:].sum(1)


def draw_windows(split: TokenSplit, count: int, seed: int, tokenizer: Tokenizer) -> np.ndarray:
    """int32 [n, PREFIX + SUFFIX]: at most `count` windows from random places, none across texts."""
    random, length = np.random.default_rng(seed), PREFIX + SUFFIX
    borders = [id_ for id_ in (*tokenizer.ends_of_text, tokenizer.begin_of_text) if id_ is not None]
    kept: dict[int, np.ndarray] = {}
    for _ in range(_ATTEMPTS if len(split) >= length else 0):
        for start in random.integers(0, len(split) - length + 1, count - len(kept)).tolist():
            window = split.read(start, length)
            if not np.isin(window, borders).any():
                kept[start] = window
    return np.stack(list(kept.values())) if kept else np.empty((0, length), np.int32)


def predictions(scorer: Scorer, windows: np.ndarray) -> Predictions:
    """Of every window, from one pass over each."""
    texts = [[(token.rank, token.logprob) for token in text[1:]] for text in scorer.score(windows)]
    numbers = np.array(texts, np.float64)
    return Predictions(numbers[..., 0].astype(int), numbers[..., 1])


def occurrences(split: TokenSplit, windows: np.ndarray) -> np.ndarray:
    """int64 [n]: how many times each window's tokens stand in the split.

    Places are found by a polynomial hash modulo 2^64, and compared token by token.
    """
    length = windows.shape[1]
    base = np.uint64(0x9E3779B97F4A7C15)
    powers = np.cumprod(np.full(length, base, np.uint64))[::-1]
    hashes = (windows.astype(np.uint64) * powers).sum(1)
    counts = np.zeros(len(windows), np.int64)
    for start in range(0, len(split) - length + 1, _CHUNK):
        ids = split.read(start, min(_CHUNK + length - 1, len(split) - start))
        rolling = np.zeros(len(ids) - length + 1, np.uint64)
        for place, power in enumerate(powers):
            rolling += ids[place : place + len(rolling)].astype(np.uint64) * power
        for place in np.flatnonzero(np.isin(rolling, hashes)).tolist():
            counts += (windows == ids[place : place + length]).all(1)
    return counts


def extraction(numbers: Predictions) -> dict[str, Any]:
    """The shares of windows whose suffix is verbatim, and extractable."""
    whole = numbers.of_suffix
    # log(1 - P)^n, exact for a small P too. P = 1 is never missed.
    with np.errstate(divide="ignore"):
        missed = np.log1p(-np.exp(whole))
    return {
        "windows": len(whole),
        "verbatim_share": float((numbers.ranks[:, -SUFFIX:] == 1).all(1).mean()),
        "extractable": [
            {"draws": n, "probability": p, "share": float((-np.expm1(n * missed) >= p).mean())}
            for n, p in DRAWS
        ],
        "mean_suffix_logprob": float(whole.mean()),
    }


def by_occurrences(counts: np.ndarray, numbers: Predictions) -> list[dict[str, Any]]:
    """`extraction` of the windows that occur once, 2 to 3 times, 4 to 7 times, and so on."""
    level = np.log2(np.maximum(counts, 1)).astype(int)
    return [
        {"at_least": 2**n, "at_most": 2 ** (n + 1) - 1}
        | extraction(Predictions(*(array[level == n] for array in numbers)))
        for n in np.unique(level).tolist()
    ]


def likeliest(numbers: Predictions) -> np.ndarray:
    """The numbers of the windows, the likeliest suffix first."""
    return np.argsort(-numbers.of_suffix)


def membership(members: Predictions, others: Predictions) -> dict[str, Any]:
    """How well the mean log-probability, and min-k %, tell training text from held-out text."""
    scores = [(one.logprobs.mean(1), least_likely(one.logprobs)) for one in (members, others)]
    by_loss, by_least = (separation(*pair) for pair in zip(*scores, strict=True))
    return {**by_loss, "min_k": by_least}


def least_likely(logprobs: np.ndarray, share: float = 0.2) -> np.ndarray:
    """float [n]: the mean of each row's least log-probabilities, a `share` of them (min-k %)."""
    count = max(1, math.ceil(share * logprobs.shape[1]))
    return np.sort(logprobs, axis=1)[:, :count].mean(1)


def separation(members: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """How well a score that is higher for members tells them apart.

    Returns:
      auc: the probability that a member's score is above another's, ties by half.
      tpr_at_1_percent_fpr: the share of members above all but 1 % of the others.
    """
    others = np.sort(others)
    below = np.searchsorted(others, members, side="left")
    equal = np.searchsorted(others, members, side="right") - below
    threshold = others[-1 - len(others) // 100]
    return {
        "auc": float((below + equal / 2).mean() / len(others)),
        "tpr_at_1_percent_fpr": float((members > threshold).mean()),
    }


def canary_exposure(scorer: Scorer, canary: str, seed: int) -> dict[str, Any]:
    """The canary's rank by total nats among RIVALS random texts of its form, and its exposure."""
    others = rivals(canary, seed)
    encoded = (scorer.tokenizer.encode(text) for text in (canary, *others))
    nats = [
        -math.fsum(token.logprob for token in tokens if token.logprob is not None)
        for tokens in scorer.score(map(scorer.tokenizer.begun, encoded))
    ]
    rank = 1 + sum(other < nats[0] for other in nats[1:])
    bits = math.log2(len(nats) / rank)
    return {"text": canary, "nats": nats[0], "rank": rank, "of": len(nats), "exposure": bits}


def rivals(canary: str, seed: int, count: int = RIVALS) -> list[str]:
    """Random texts of a canary's form: its digits are drawn anew, or its letters if it has none."""
    random = np.random.default_rng(seed)
    sets = [string.digits]
    if not any(character in string.digits for character in canary):
        sets = [string.ascii_lowercase, string.ascii_uppercase]
    alike = [next((s for s in sets if character in s), character) for character in canary]
    if all(len(s) == 1 for s in alike):
        raise UsageError(
            f"--canary {canary!r} has neither digits nor Latin letters; expected a text with a "
            "secret in it, whose digits (or letters, if it has none) are drawn anew to compare with"
        )
    return ["".join(s[random.integers(len(s))] for s in alike) for _ in range(count)]
