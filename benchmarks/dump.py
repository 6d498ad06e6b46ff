"""What a probability dump costs: sampling with `--probs --top 10` against sampling without.

    python benchmarks/dump.py [--config configs/quickstart.toml] [--samples 4] [--tokens 200]

Weights are random: what they are changes no time. The two kinds take turns in one process, so that
other work on the machine falls on both. Each turn is what the sample command does from prompt to
text, and with the dump also to the file: drawing, prefill, text, records, JSON.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.toml")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        turn = prepare(options, Path(folder, "probs.jsonl"))
        for dumps in (False, True):
            turn(dumps)  # compiles
        pairs = [(turn(False), turn(True)) for _ in range(options.turns)]
    without, with_ = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    tokens = options.samples * options.tokens
    print(f"{tokens} tokens without a dump: {without:.3f} s, {tokens / without:.0f} tokens/s")
    print(f"{tokens} tokens with a dump:    {with_:.3f} s, {tokens / with_:.0f} tokens/s")
    print(f"with / without: {ratio:.3f} (median of {options.turns} pairs)")
    print(json.dumps({"without": without, "with": with_, "ratio": ratio}))


def prepare(options: argparse.Namespace, path: Path):
    """A function: seconds that one turn takes, with a dump or without."""
    from llm.runtime import prepare_process

    prepare_process()
    from llm.config import load_config
    from llm.inference.decode import Decoder, Request, encode_prompt
    from llm.inference.records import Sampling, to_line
    from llm.run.setup import setup_to_predict
    from llm.text.tokenizer import ByteTokenizer, tiktoken_tokenizer
    from llm.training.optimizer import make_optimizer
    from llm.training.state import create_state

    config = load_config(options.config).resolved()
    kind = config.tokenizer.kind
    tokenizer = copy.copy(ByteTokenizer() if kind == "bytes" else tiktoken_tokenizer(kind))
    tokenizer.end_of_text = None  # random weights may well draw it, and the rows would end there
    setup = setup_to_predict(config, tokenizer.vocab_size)
    params = create_state(setup.spec, make_optimizer(config.optimizer), 0, setup.mesh).params
    decoder = Decoder.create(setup.spec, params, tokenizer)
    prompt = encode_prompt(tokenizer, "def main(")

    def turn(dumps: bool) -> float:
        start = time.perf_counter()
        requests = [
            Request(
                prompt,
                Sampling(temperature=0.8, top_k=50, top_p=0.95),
                index=index,
                max_new_tokens=options.tokens,
                top=options.top if dumps else None,
            )
            for index in range(options.samples)
        ]
        text = []
        with open(path, "w") as file:
            for new in decoder.generate(requests):
                text += [token.text for token in new.tokens]
                if dumps:
                    file.writelines(map(to_line, new.tokens))
        seconds = time.perf_counter() - start
        assert len(text) == options.samples * (len(prompt) + options.tokens)
        return seconds

    return turn


if __name__ == "__main__":
    main()
