"""The plot of the decode table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def plot_decode(rows: list[dict[str, Any]], path: Path) -> None:
    """TPOT (ms) and tokens/s over the number of inferlets, each side with its spread."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    counts = [row["inferlets"] for row in rows]
    sides = {"bare": "bare loop", "c": "C inferlets", "python": "Python inferlets"}
    for axis, key, scale, label in (
        (axes[0], "tpot", 1e3, "time per output token, ms"),
        (axes[1], "tokens_per_second", 1.0, "tokens/s"),
    ):
        for side, name in sides.items():
            cells = [row[side][key] for row in rows]
            middle = [c["median"] * scale for c in cells]
            below = [m - c["min"] * scale for m, c in zip(middle, cells, strict=True)]
            above = [c["max"] * scale - m for m, c in zip(middle, cells, strict=True)]
            axis.errorbar(counts, middle, yerr=[below, above], marker="o", capsize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(c) for c in counts])
        axis.set_xlabel("inferlets at once")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
