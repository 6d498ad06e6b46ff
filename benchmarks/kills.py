"""Kill a small run many times and compare it with one that nothing disturbed.

    python benchmarks/kills.py --kills 500

Prints how many kills hit each place, and whether every loss and the final parameters are equal. The
test suite does the same with 25 kills (tests/test_kills.py).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: F401  (sets the environment before JAX is imported)
from kills import train_under_kills
from runs import losses, params_sha256, run_process, starts, write_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    steps = 8 * chosen.kills + 100
    settings = {
        "training": {"steps": steps, "eval_every": 10},
        "checkpoint": {"every": 5, "keep": 2},
        "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4},
        "sample": {"max_new_tokens": 0},
    }
    with tempfile.TemporaryDirectory() as folder:
        unbroken, broken = Path(folder, "unbroken"), Path(folder, "broken")
        for path in (unbroken, broken):
            path.mkdir()
        code, output = run_process(write_config(unbroken, **settings))
        assert code == 0, output
        start = time.monotonic()
        hit = train_under_kills(
            write_config(broken, **settings), broken / "run", chosen.kills, chosen.seed
        )
        seconds = time.monotonic() - start
        equal = losses(broken / "run") == losses(unbroken / "run")
        same = params_sha256(broken / "run", steps) == params_sha256(unbroken / "run", steps)
        redone = [start["redone_steps"] for start in starts(broken / "run")]
    for place, count in sorted(hit.items()):
        print(f"{count:5}  {place}")
    print(f"{hit.total():5}  kills in {seconds:.0f} s, {steps} steps")
    print(f"{sum(redone)} steps done again, at most {max(redone)} after one kill (saves every 5)")
    print(f"losses equal: {equal}; parameters equal: {same}")
    return 0 if equal and same else 1


if __name__ == "__main__":
    sys.exit(main())
