"""The curves of a report as pictures for a paper: one PNG a chart, drawn by matplotlib."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.errors import UsageError, needing
from llm.pages.report_data import CURVES

# Inches and dots per inch: a column of a paper, at the resolution of print.
SIZE, DPI = (5.0, 3.2), 200
# Fonts that have the characters of names which matplotlib's own font does not have.
FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "Noto Emoji")


def write_pictures(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Write FOLDER/CURVE.png of each curve that a run has, against steps; returns the paths.

    Raises:
      UsageError: matplotlib is not installed, or the folder cannot be written.
    """
    with needing("--png", "'glassbox-gpt[plots]'"):
        from matplotlib import rcParams
        from matplotlib.figure import Figure  # without pyplot: no window, no state
        from matplotlib.font_manager import fontManager
    rcParams["font.family"] += set(FONTS) & set(fontManager.get_font_names())
    # A character that no font has is a box.
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    written = []
    for name in (*CURVES, "bits_per_byte"):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=name.replace("_", " "))
        for number, run in enumerate(report["runs"]):
            # In a title a dollar sign would begin a formula.
            colour, title = f"C{number}", run["name"].replace("$", r"\$")
            if name in run["train"]:
                step, label = run["train"]["step"], f"{title}, training"
                axes.plot(step, run["train"][name], color=colour, alpha=0.25)
                axes.plot(step, run["smoothed"][name], color=colour, label=label)
            for of in run["evaluations"]:
                if name in of and any(value is not None for value in of[name]):
                    label = " of ".join(filter(None, (f"{title}, validation", of["source"])))
                    axes.plot(of["step"], of[name], "o--", color=colour, ms=3, label=label)
        if not axes.lines:
            continue
        axes.legend(fontsize="small")
        path = folder / f"{name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise UsageError(
                f"cannot write {path}: {error.strerror}; name a folder that can be"
            ) from None
        written.append(str(path))
    return written
