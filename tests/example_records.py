"""Token-probability records of a small n-gram model over real text, for tests of what shows them.

Written from the definitions in numpy, without the code that writes records from a checkpoint, so
that the two can be held against each other.
"""

import bisect
import codecs
import csv
import math
import re
import shlex
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

CHINESE = (
    "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。"
    "故常無欲，以觀其妙；常有欲，以觀其徼。此兩者，同出而異名，同謂之玄。玄之又玄，眾妙之門。\n"
)
EMOJI = "Emoji: 🌍 🦜 👩‍🔬 👨‍👩‍👧 🎉, and naïve café.\n"
PIECE = re.compile(r" ?[A-Za-z_]+| ?[0-9]+| ?[^\sA-Za-z_0-9\x80-\U0010ffff]+|\n+ *|\s|.", re.DOTALL)


def training_text() -> str:
    """Source code of the standard library, and characters of three and four bytes."""
    code = [Path(module.__file__).read_text("utf-8") for module in (textwrap, shlex, csv, bisect)]
    return "".join(code) + 4 * (CHINESE + EMOJI)


class NGram:
    """P(next | last three tokens) from counts, backing off to ever shorter contexts:

        P_k = (count_k + doubt P_(k-1)) / (total_k + doubt)

    Tokens are the 256 bytes and the pieces of ASCII that occur at least twice, so other characters
    are spread over byte tokens. A larger `doubt` is a model that has learnt less.
    """

    def __init__(self, text: str, doubt: float = 1.0, order: int = 4):
        pieces = Counter(piece for piece in PIECE.findall(text) if piece.isascii())
        words = [piece for piece, n in pieces.most_common() if n > 1 and len(piece) > 1]
        self.table = [bytes([b]) for b in range(256)] + [word.encode() for word in words] + [b""]
        self.id_of = {token: i for i, token in enumerate(self.table[:-1])}
        self.vocab_size, self.end_of_text = len(self.table), len(self.table) - 1
        self.doubt, self.order = doubt, order
        ids = self.encode(text)
        self.counts = defaultdict(Counter)
        for end in range(1, len(ids)):
            for length in range(1, min(order, end + 1)):
                self.counts[tuple(ids[end - length : end])][ids[end]] += 1
        frequency = np.bincount(ids, minlength=self.vocab_size) + 0.02
        self.frequency = frequency / frequency.sum()

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in PIECE.findall(text):
            known = self.id_of.get(piece.encode())
            ids += [known] if known is not None else list(piece.encode())
        return ids

    def logprobs(self, context: list[int]) -> np.ndarray:
        """float64 [vocab_size]"""
        p = self.frequency
        for length in range(1, min(self.order, len(context) + 1)):
            seen = self.counts.get(tuple(context[-length:]), {})
            counts = np.zeros(self.vocab_size)
            counts[list(seen)] = list(seen.values())
            p = (counts + self.doubt * p) / (counts.sum() + self.doubt)
        return np.log(p)

    def name(self, token_id: int) -> str:
        return self.table[token_id].decode("utf-8", "backslashreplace") or "<|endoftext|>"


def records_of(
    model: NGram,
    samples: list[tuple[list[int], int]],
    *,
    sampling: dict | None = None,
    top: int = 10,
    step: int = 2000,
) -> list[dict]:
    """A run record, then for each (prompt ids, tokens to generate) its token and end records."""
    records = [
        {
            "type": "run",
            "schema": 1,
            "checkpoint": {"run": "runs/example", "step": step, "params_sha256": "5f1c90ab" * 8},
            "tokenizer": {"name": "pieces", "sha256": "00ff" * 16, "vocab_size": model.vocab_size},
            "sampling": sampling,
            "numerics": {
                "path": "cached" if sampling else "teacher_forced",
                "param_dtype": "float32",
                "compute_dtype": "float32",
                "platform": "cpu",
                "jax": "0.12.0",
            },
            "top": top,
        }
    ]
    for number, (prompt, count) in enumerate(samples):
        records += _sample_records(model, prompt, count, number, sampling, top)
    return records


def _sample_records(model, prompt, count, number, sampling, top):
    random = np.random.default_rng([number, (sampling or {}).get("seed") or 0])
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    records, text, offset, ids, finish = [], "", 0, [], "length"
    for position in range(len(prompt) + count):
        logprobs = model.logprobs(ids) if ids else None
        if position < len(prompt):
            token_id, drawn = prompt[position], None
        else:
            drawn = _filtered(logprobs, sampling)
            token_id = int(random.choice(model.vocab_size, p=np.exp(drawn)))
        record = token_record(model, number, position, token_id, logprobs, drawn, top, decoder)
        record |= {"text_offset": len(text), "byte_offset": offset}
        records.append(record)
        text, offset = text + record["text"], offset + len(record["bytes"])
        ids.append(token_id)
        if drawn is not None and token_id == model.end_of_text:
            finish = "end_of_text"
            break
    text += _flush(decoder, records)
    return [*records, _end_record(number, records, text, finish)]


def _flush(decoder, records) -> str:
    """A character that the sample's end leaves open becomes U+FFFD in its last token."""
    rest = decoder.decode(b"", final=True)
    if rest:
        records[-1] |= {"text": records[-1]["text"] + rest, "utf8": "bad"}
    return rest


def _filtered(logprobs, sampling):
    """The distribution that is drawn from: temperature, then top-k, then top-p."""
    scaled = logprobs / sampling["temperature"]
    order = np.argsort(-scaled, kind="stable")
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    kept = order[: sampling["top_k"]]
    mass_before = np.cumsum(probabilities[kept]) - probabilities[kept]
    kept = kept[mass_before < sampling["top_p"]]
    drawn = np.full(len(logprobs), -np.inf)
    drawn[kept] = np.log(probabilities[kept] / probabilities[kept].sum())
    return drawn


def token_record(model, sample, position, token_id, logprobs, drawn, top, decoder):
    data = model.table[token_id]
    inside_before = bool(decoder.getstate()[0])
    text = decoder.decode(data)
    inside = bool(decoder.getstate()[0])
    utf8 = [["ok", "open"], ["close", "continue"]][inside_before][inside]
    record = {
        "type": "token",
        "sample": sample,
        "phase": "prompt" if drawn is None else "generated",
        "position": position,
        "id": token_id,
        "token": model.name(token_id),
        "bytes": list(data),
        "text": text,
        "utf8": "bad" if "\ufffd" in text else utf8,
        "logprob": None,
        "rank": None,
        "entropy": None,
        "sampling_logprob": None,
        "kept_mass": None,
        "kept_tokens": None,
        "top": [],
    }
    if logprobs is not None:
        order = np.argsort(-logprobs, kind="stable")
        record["logprob"] = float(logprobs[token_id])
        record["rank"] = int(np.flatnonzero(order == token_id)[0]) + 1
        record["entropy"] = float(-(np.exp(logprobs) * logprobs).sum())
        record["top"] = [
            {
                "id": int(i),
                "token": model.name(int(i)),
                "bytes": list(model.table[i]),
                "logprob": float(logprobs[i]),
                "kept": None if drawn is None else bool(np.isfinite(drawn[i])),
            }
            for i in order[:top]
        ]
    if drawn is not None:
        kept = np.isfinite(drawn)
        record["sampling_logprob"] = float(drawn[token_id])
        record["kept_mass"] = float(np.exp(logprobs[kept]).sum())
        record["kept_tokens"] = int(kept.sum())
    return record


def _end_record(number, records, text, finish):
    """Sums over the generated tokens; over all with a probability where none is generated."""
    generated = [record for record in records if record["phase"] == "generated"]
    counted = [record for record in generated or records if record["logprob"] is not None]
    logprobs = [record["logprob"] for record in counted]
    total, size = sum(logprobs), sum(len(record["bytes"]) for record in counted)
    return {
        "type": "end",
        "sample": number,
        "finish": finish,
        "tokens": len(counted),
        "sum_logprob": total,
        "perplexity": math.exp(-total / max(len(logprobs), 1)),
        "bits_per_byte": -total / max(size, 1) / math.log(2),
        "text": text,
    }


SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": None, "seed": 1}


def sampled(count: int = 160, samples: int = 2, doubt: float = 1.0) -> list[dict]:
    """Python from a prompt, and a second sample whose prompt is Chinese and emoji."""
    model = NGram(training_text(), doubt)
    prompts = ["    def wrap(self, text):\n        ", CHINESE[:24] + EMOJI]
    chosen = [(model.encode(prompts[i % 2]), count) for i in range(samples)]
    return records_of(model, chosen, sampling=SAMPLING)


def scored(text: str, doubt: float = 1.0, step: int = 2000) -> list[dict]:
    """A given text, as the same model sees it after less (larger `doubt`) or more training."""
    model = NGram(training_text(), doubt)
    return records_of(model, [(model.encode(text), 0)], step=step)


def given(pieces: list[bytes]) -> list[dict]:
    """Records of any tokens at all, with made-up probabilities."""
    model = NGram(" ab ab ab")
    model.table = pieces
    model.vocab_size, random = len(pieces), np.random.default_rng(0)
    decoder, records, text, offset = codecs.getincrementaldecoder("utf-8")("replace"), [], "", 0
    for position, _ in enumerate(pieces):
        logits = random.normal(size=len(pieces)) * 3
        logprobs = logits - np.log(np.exp(logits).sum())
        record = token_record(model, 0, position, position, logprobs, None, 3, decoder)
        record |= {"text_offset": len(text), "byte_offset": offset}
        text, offset = text + record["text"], offset + len(record["bytes"])
        records.append(record)
    text += _flush(decoder, records)
    run = records_of(model, [])[0]
    return [run, *records, _end_record(0, records, text, "length")]
