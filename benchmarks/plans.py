"""What llm plan says of this repository's large configurations, as a table.

    python benchmarks/plans.py                        all of it
    python benchmarks/plans.py --only llama3_8b.v5p   plans with this in their name
    python benchmarks/plans.py --table                the table of the plans that are there

Each plan is kept as JSON in build/plans. Needs the extra `plan`; a plan takes minutes on two cores.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / "build" / "plans"
LLAMA, GPT2, MOE = (f"configs/{name}.toml" for name in ("llama3_8b", "gpt2_1558m", "moe_8x124m"))
SCANNED = "--training.scan-layers true"
# name -> arguments of the command
PLANS = {
    "llama3_8b.h100-8": f"{LLAMA} --devices 8 --device h100 --training.remat dots",
    "llama3_8b.v5p-4x4x4": f"{LLAMA} --topology v5p:4x4x4 --training.micro-batch-size 64 "
    "--mesh.data 4 --mesh.fsdp 16 --training.remat dots",
    "llama3_8b.v5e-16x16": f"{LLAMA} --topology v5e:16x16 --training.micro-batch-size 256",
    "llama3_8b.v6e-16x16": f"{LLAMA} --topology v6e:16x16 --training.micro-batch-size 256",
    "llama3_8b.v5e-1x1": f"{LLAMA} --topology v5e:1x1",
    "gpt2_1558m.h100-8": f"{GPT2} --devices 8 --device h100 {SCANNED} --training.remat block",
    "gpt2_1558m.v5p-2x4x4": f"{GPT2} --topology v5p:2x4x4 --training.micro-batch-size 480 "
    f"--mesh.fsdp 32 {SCANNED} --training.remat dots",
    "moe_8x124m.h100-8": f"{MOE} --devices 8 --device h100 {SCANNED}",
    "moe_8x124m.v5p-4x4x4": f"{MOE} --topology v5p:4x4x4 --training.micro-batch-size 512 {SCANNED}",
}
# The same step on more and more chips, a sequence on each: 8 to 1024 of v5p.
CHIPS = {8: "2x2x2", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16"}
GROWING = {
    f"growing.v5p-{shape}": f"{LLAMA} --topology v5p:{shape} --training.batch-size "
    f"{max(512, chips)} --training.micro-batch-size {chips} --training.remat dots"
    for chips, shape in CHIPS.items()
}

COLUMNS = (
    "plan",
    "chips",
    "state, GiB",
    "temporaries, GiB",
    "fits",
    "s a step",
    "MFU, at most",
    "compile, s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="plans whose name contains this")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    chosen = parser.parse_args()
    for name, arguments in ({} if chosen.table else {**PLANS, **GROWING}).items():
        if chosen.only in name:
            make_plan(name, arguments)
    print_table()


def make_plan(name: str, arguments: str) -> None:
    """Run the command and keep its JSON."""
    command = [sys.executable, "-m", "llm", "plan", *shlex.split(arguments), "--json"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    print(name, flush=True)
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode:
        print(f"  failed with exit code {result.returncode}", flush=True)
        return
    FACTS.mkdir(parents=True, exist_ok=True)
    (FACTS / f"{name}.json").write_text(result.stdout)


def print_table() -> None:
    """One row a plan, in Markdown; the growing ones apart."""
    for names in (PLANS, GROWING):
        print(f"| {' | '.join(COLUMNS)} |")
        print("|" + "---|" * len(COLUMNS))
        for name in names:
            path = FACTS / f"{name}.json"
            if path.exists():
                print(row_of(name, json.loads(path.read_text())))
        print()


def row_of(name: str, facts: dict) -> str:
    memory, seconds = facts["memory"], facts["time"]["step_seconds"]
    state = memory["weights_bytes"] + memory["optimizer_bytes"]
    temporaries = memory["temporaries_bytes"]
    cells = [
        name,
        str(facts["devices"]),
        f"{state / 2**30:.2f}",
        "" if temporaries is None else f"{temporaries / 2**30:.2f}",
        "yes" if memory["fits"] else f"no, by {-memory['spare_bytes'] / 2**30:.1f} GiB",
        "" if seconds is None else f"{seconds:.3g}",
        "" if facts["mfu"] is None else f"{facts['mfu']:.1%}",
        f"{facts['compile_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
