"""What the report and the probes of a run cost, as a share of the run's time.

    python benchmarks/report.py RUN

Times the page as the run writes it, a scoring of its probes, and what the program that scores them
takes longer to compile than a receipt's own, which a run without probes would compile instead.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from llm.pages.report import write_report
from llm.run.directory import RunDirectory
from llm.run.metrics import Rows
from llm.run.open import open_model
from llm.run.probes import ProbeRow, ProbesFile
from llm.run.receipt import receipt_logprobs
from llm.training.probes import Probes

REPEATS = 7


def timed(call) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    run = RunDirectory(Path(sys.argv[1]))
    opened, record = open_model(run.path), run.read_provenance()
    rows = [row for _, row in Rows(run.probes, ProbeRow).appended()]
    steps = sorted({row.step for row in rows if row.prompt is None})
    held_out = np.array([row.ids for row in rows if row.step == steps[0] and row.prompt is None])
    with tempfile.TemporaryDirectory() as folder:
        file = ProbesFile(Path(folder) / "probes.jsonl")
        probes = Probes(opened.spec, opened.tokenizer, (), held_out, True, file)
        compiling = []
        for compute in (
            lambda: receipt_logprobs(opened.spec, opened.params, held_out).block_until_ready(),
            lambda: probes.receipt(opened.params)(),
        ):
            jax.clear_caches()
            first, again = timed(compute), timed(compute)
            compiling.append(first - again)
        scorings = [timed(lambda n=n: probes.score(opened.params, n)) for n in range(REPEATS)]
    pages = [timed(lambda: write_report(run)) for _ in range(REPEATS)]
    total = record["starts"][-1]["seconds"]["total"]
    evaluations = sum(b'"eval"' in line for line in run.metrics.read_bytes().splitlines())
    later = statistics.median(scorings[1:])
    spent = scorings[0] + compiling[1] - compiling[0] + later * (len(steps) - 1)
    written = statistics.median(pages) * (1 + evaluations)
    print(json.dumps({
        "receipt_compiling_seconds": round(compiling[0], 3),
        "probes_compiling_seconds": round(compiling[1], 3),
        "first_scoring_seconds": round(scorings[0], 3),
        "later_scoring_seconds": round(later, 4),
        "scorings": len(steps),
        "page_seconds": round(statistics.median(pages), 4),
        "run_seconds": total,
        "pages": 1 + evaluations,
        "probes_share": round(spent / total, 4),
        "pages_share": round(written / total, 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
