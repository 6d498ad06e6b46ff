"""Load a server with many clients at once, some of them badly behaved, and check every good answer.

    python -m llm serve runs/quickstart --port 8000 --warm-up &
    python benchmarks/serve.py --clients 32 --seconds 60

First every request is asked for alone and its answer recorded. Then the clients ask at once, each
for one request after the other: whole answers, streams and scores, of different lengths, and among
them requests that are malformed and clients that leave in the middle. Every good answer must equal
the one recorded: the same text, log-probabilities within 1e-4 (float32). Every malformed one must
be refused, and in the end no row may be held by a client that left.

Prints what happened and one JSON line; exit code 1 when anything was not as it should be. Uses the
standard library alone. Latencies are those of whole answers, streams and scores, from the first
byte sent to the last received.
"""

import argparse
import http.client
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

WORDS = ("def", "return", "import", "for", "class", "self", "the", "of", "and", "while", "None")
MALFORMED = [
    (b"{", 400),
    (b'{"prompt": "a", "temperature": NaN}', 400),
    (b'{"prompt": "a", "max_tokens": "many"}', 400),
    (b'{"prompt": [-1]}', 400),
    (b'{"prompt": "a", "max_token": 1}', 400),
    (b'{"prompt": "a", "model": "gpt-4"}', 404),
    (b" " * 3_000_000, 413),
]


@dataclass
class Tally:
    """What all clients saw; `lock` guards it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    kinds: Counter = field(default_factory=Counter)
    wrong: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    tokens: int = 0
    scored: int = 0
    worst: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=48, help="different ones")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    requests = make_requests(chosen.requests, chosen.max_tokens, random.Random(chosen.seed))
    start = time.perf_counter()
    expected = [ask(chosen.url, request) for request in requests]
    alone = time.perf_counter() - start
    print(f"{len(requests)} requests one after the other: {alone:.1f} s", file=sys.stderr)
    tally = Tally()
    end = time.perf_counter() + chosen.seconds
    threads = [
        threading.Thread(target=client, args=(chosen, n, requests, expected, tally, end))
        for n in range(chosen.clients)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report(chosen, tally, time.perf_counter() - start)


def make_requests(count, max_tokens, rng):
    """Every fifth is a score; the others draw, every third as a stream."""
    requests = []
    for number in range(count):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))
        request = {"prompt": prompt, "seed": number, "logprobs": rng.randint(0, 5)}
        if number % 5 == 0:
            request |= {"max_tokens": 0, "echo": True}
        else:
            request |= {
                "max_tokens": rng.randint(1, max_tokens),
                "temperature": rng.choice([0.0, 0.7, 1.0]),
                "top_p": rng.choice([0.9, 1.0]),
                "stream": number % 3 == 0,
            }
        requests.append(request)
    return requests


def client(chosen, number, requests, expected, tally, end):
    """Asks until the time is over: of twelve turns ten are good, one malformed, one is left."""
    rng = random.Random(f"{chosen.seed} {number}")
    while time.perf_counter() < end:
        turn = rng.randrange(12)
        if turn == 0:
            kind, problem = "malformed", send_malformed(chosen.url, rng)
        elif turn == 1:
            kind, problem = "left", leave(chosen.url, requests[rng.randrange(len(requests))], rng)
        else:
            index = rng.randrange(len(requests))
            kind = kind_of(requests[index])
            problem = ask_and_compare(chosen.url, requests[index], expected[index], tally)
        with tally.lock:
            tally.kinds[kind] += 1
            if problem is not None:
                tally.wrong.append(f"{kind}: {problem}")


def kind_of(request):
    if request["max_tokens"] == 0:
        return "score"
    return "stream" if request["stream"] else "whole"


def ask_and_compare(url, request, expected, tally):
    start = time.perf_counter()
    try:
        got = ask(url, request)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        return repr(error)
    seconds = time.perf_counter() - start
    text, logprobs = got
    if text != expected[0] or len(logprobs) != len(expected[1]):
        return f"{request} gave {text!r}, alone it gave {expected[0]!r}"
    pairs = [pair for pair in zip(logprobs, expected[1], strict=True) if None not in pair]
    worst = max((abs(a - b) for a, b in pairs), default=0.0)
    with tally.lock:
        tally.seconds.append(seconds)
        tally.worst = max(tally.worst, worst)
        if request["max_tokens"]:
            tally.tokens += len(logprobs)
        else:
            tally.scored += len(logprobs)
    return f"{request}: log-probabilities {worst:.1e} apart" if worst > 1e-4 else None


def ask(url, request):
    """(text, log-probabilities) of the answer, streamed or whole."""
    connection = post(url, json.dumps(request).encode())
    response = connection.getresponse()
    body = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {body[:300]!r}")
    if not request.get("stream"):
        choices = json.loads(body)["choices"]
    else:
        lines = [line for line in body.split(b"\n\n") if line]
        if lines[-1] != b"data: [DONE]":
            raise RuntimeError(f"the stream ended with {lines[-1]!r}")
        events = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
        choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["text"] for choice in choices)
    return text, [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]


def post(url, body):
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=300.0)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection


def send_malformed(url, rng):
    body, status = rng.choice(MALFORMED)
    try:
        connection = post(url, body)
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        connection.close()
    except (OSError, ValueError, KeyError, http.client.HTTPException) as failure:
        return f"{body[:60]!r}: {failure!r}"
    if response.status != status or not error["message"]:
        return f"{body[:60]!r} got {response.status}, expected {status}"
    return None


def leave(url, request, rng):
    """Ask, wait a little, and close the connection whatever has come."""
    try:
        connection = post(url, json.dumps(request).encode())
        time.sleep(rng.random() * 0.2)
        if connection.sock is not None and rng.random() < 0.5:
            connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError as failure:
        return repr(failure)
    return None


def report(chosen, tally, seconds):
    health = wait_until_idle(chosen.url)
    if health["active"] or health["queued"]:
        tally.wrong.append(f"rows are held by nobody: {health}")
    good = len(tally.seconds)
    cuts = statistics.quantiles(tally.seconds, n=20) if good > 1 else [0.0] * 19
    result = {
        "clients": chosen.clients,
        "seconds": round(seconds, 1),
        "good": good,
        "wrong": len(tally.wrong),
        "requests_per_second": round(good / seconds, 2),
        "tokens_per_second": round(tally.tokens / seconds, 1),
        "scored_tokens_per_second": round(tally.scored / seconds, 1),
        "p50_seconds": round(cuts[9], 3),
        "p95_seconds": round(cuts[18], 3),
        "max_abs_logprob_difference": tally.worst,
        "kinds": dict(sorted(tally.kinds.items())),
    }
    for problem in tally.wrong[:20]:
        print(f"WRONG {problem}", file=sys.stderr)
    for name, value in result.items():
        print(f"{name:28} {value}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if tally.wrong or not good else 0


def wait_until_idle(url):
    """The server's health as soon as nothing runs, or after ten seconds."""
    place = urlsplit(url)
    for _ in range(100):
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60.0)
        connection.request("GET", "/health")
        health = json.loads(connection.getresponse().read())
        connection.close()
        if not health["active"] and not health["queued"]:
            break
        time.sleep(0.1)
    return health


if __name__ == "__main__":
    sys.exit(main())
