"""`python -m bench [--long]`: everything in one run, tables on stdout, files in bench/results."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import measure
from .bare import BareLoop
from .plot import plot_decode
from .served import programs, server

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--long", action="store_true", help="more samples")
    parser.add_argument("--threads", type=int, help="compute threads, of both sides")
    args = parser.parse_args()
    repeats, launched = (9, 200) if args.long else (3, 40)
    options = ["--threads", str(args.threads)] if args.threads else []
    loop = BareLoop(args.threads)
    result: dict[str, Any] = {
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
    }
    with server(*options) as client, programs() as built:
        result["decode"] = measure.decode(client, loop, built["clock"], [1, 8, 32, 64], repeats)
        result["launch"] = {
            language: measure.launches(client, path, launched)
            for language, path in built["hello"].items()
        }
        result["calls"] = {
            language: measure.calls(client, path, 1000, repeats)
            for language, path in built["calls"].items()
        }
    show(result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_decode(result["decode"], RESULTS / "decode.png")
    print(f"\nwrote {RESULTS / 'bench.json'} and decode.png")


def show(result: dict[str, Any]) -> None:
    print("\nDecode, embedded model (32 prompt tokens, 128 new; median [min .. max])\n")
    print(
        "inferlets  side    TPOT ms                  tokens/s  TPOT / bare           "
        "mean batch  messages/token"
    )
    for row in result["decode"]:
        for side in ("bare", "c", "python"):
            cells = row[side]
            ratio = text(cells.get("tpot_over_bare"), 1, 3)
            batch = cells.get("mean_batch", {}).get("median")
            per_token = cells.get("messages_per_token", {}).get("median")
            print(
                f"{row['inferlets']:>9}  {side:<6}  {text(cells['tpot'], 1e3, 2):<23}"
                f"  {cells['tokens_per_second']['median']:>8.0f}  {ratio:<20}"
                f"  {'' if batch is None else f'{batch:.1f}':>10}"
                f"  {'' if per_token is None else f'{per_token:.3f}':>14}"
            )
    print("\nLaunch to first message, ms")
    for language, cells in result["launch"].items():
        print(f"  {language:<8}{text(cells, 1e3, 2)}")
    print("\nControl call, us: waiting for each; all in few frames")
    for language, cells in result["calls"].items():
        print(
            f"  {language:<8}{text(cells['round_trip'], 1e6, 1):<26}"
            f"{text(cells['amortised'], 1e6, 2)}"
        )


def text(cells: dict[str, float] | None, scale: float, digits: int) -> str:
    if cells is None:
        return ""
    median, low, high = (f"{cells[k] * scale:.{digits}f}" for k in ("median", "min", "max"))
    return f"{median} [{low} .. {high}]"


if __name__ == "__main__":
    main()
