"""The curves of a report as pictures for a paper: one PNG a chart, drawn by matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.errors import UsageError, needing
from llm.pages.report_data import CURVES

# Inches and dots per inch: a column of a paper, at the resolution of print.
SIZE, DPI = (5.0, 3.2), 200


def write_pictures(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Write FOLDER/CURVE.png of each curve that a run has, against steps; returns the paths.

    Raises:
      UsageError: matplotlib is not installed, or the folder cannot be written.
    """
    with needing("--png", "'glassbox-gpt[plots]'"):
        from matplotlib.figure import Figure  # without pyplot: no window, no state
    written = []
    for name in (*CURVES, "bits_per_byte"):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=name.replace("_", " "))
        for number, run in enumerate(report["runs"]):
            colour, title = f"C{number}", run["name"]
            # In a title a dollar sign would begin a formula.
            title = title.replace("$", r"\$")
            if name in run["train"]:
                step, rows = run["train"]["step"], (run["train"][name], run["smoothed"][name])
                for alpha, values in zip((0.25, 1.0), rows, strict=True):
                    label = f"{title}, training" if alpha == 1.0 else None
                    axes.plot(step, _gaps(values), color=colour, alpha=alpha, label=label)
            for of in run["evaluations"]:
                if name in of and any(value is not None for value in of[name]):
                    label = " of ".join(filter(None, (f"{title}, validation", of["source"])))
                    axes.plot(of["step"], _gaps(of[name]), "o--", color=colour, ms=3, label=label)
        if not axes.lines:
            continue
        axes.legend(fontsize="small")
        path = folder / f"{name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None
        written.append(str(path))
    return written


def _gaps(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
