"""`python -m bench [--long]`: everything in one run, tables on stdout, files in bench/results.

`--neighbours` measures that alone instead: honest inferlets beside hostile ones. `--deaths N` too:
how long the KV pages of a killed inferlet stay held; and `--layers`: what each layer of the sandbox
costs.
"""

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
from .deaths import deaths
from .layers import kernel_calls
from .neighbours import neighbours
from .plot import plot_decode
from .served import programs, server
from .stages import launch_stages

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--long", action="store_true", help="more samples")
    parser.add_argument("--threads", type=int, help="compute threads, of both sides")
    parser.add_argument(
        "--neighbours", action="store_true", help="honest inferlets beside hostile ones, instead"
    )
    parser.add_argument(
        "--deaths",
        type=int,
        metavar="N",
        help="measure only how long pages stay held after kill -9, N times",
    )
    parser.add_argument(
        "--layers", action="store_true", help="measure only what the layers of the sandbox cost"
    )
    args = parser.parse_args()
    repeats, launched = (9, 200) if args.long else (3, 40)
    options = ["--threads", str(args.threads)] if args.threads else []
    RESULTS.mkdir(exist_ok=True)
    if args.deaths:
        measure_deaths(args.deaths)
        return
    if args.layers:
        measure_layers(repeats, *options)
        return
    if args.neighbours:
        measured = neighbours(repeats, *options)
        show_neighbours(measured)
        write("neighbours.json", {"machine": machine(), "neighbours": measured})
        return
    loop = BareLoop(args.threads)
    result: dict[str, Any] = {"machine": machine()}
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
    plot_decode(result["decode"], RESULTS / "decode.png")
    write("bench.json", result)


def machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def write(name: str, result: dict[str, Any]) -> None:
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {RESULTS / name}")


def measure_deaths(kills: int) -> None:
    with server() as client, programs() as built:
        result = {
            language: deaths(client, path, kills) for language, path in built["clock"].items()
        }
    print("\nkill -9 of a generating inferlet to its KV pages being free, ms")
    for language, cells in result.items():
        times = "  ".join(f"{name} {cells[name] * 1e3:.1f}" for name in ("p50", "p99", "max"))
        print(f"  {language:<8}{times}  ({kills} kills, {cells['at_once']} at once)")
    write("deaths.json", {"machine": machine(), "deaths": result})


def measure_layers(repeats: int, *options: str) -> None:
    with programs() as built:
        stages = launch_stages(built["hello"]["c"])
    print("\nStages of a launch until the exec (static executable), us: p50, p99")
    for stage, cells in stages.items():
        print(f"  {stage:<16}{cells['p50'] * 1e6:>8.1f}{cells['p99'] * 1e6:>8.1f}")
    calls = kernel_calls(repeats, *options)
    print("\nCalls of the kernel, and of the ABI, ns")
    for where, cells in calls.items():
        times = "  ".join(f"{kind}: {text(cells[kind], 1e9, 0)}" for kind in cells)
        print(f"  {where:<12}{times}")
    write("layers.json", {"machine": machine(), "launch": stages, "calls": calls})


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


def show_neighbours(rows: list[dict[str, Any]]) -> None:
    print("\n16 honest inferlets beside attackers (median [min .. max])\n")
    print(
        f"{'attack':<24}{'honest':<8}{'server':<12}{'throughput / alone':<24}"
        f"{'tokens/s alone':<24}{'call, us: alone':<20}beside"
    )
    for row in rows:
        print(
            f"{row['attack']:<24}{row['honest']:<8}{row['server']:<12}"
            f"{text(row['ratio'], 1, 3):<24}{text(row['alone'], 1, 0):<24}"
            f"{text(row['round_trip_alone'], 1e6, 0):<20}{text(row['round_trip_beside'], 1e6, 0)}"
        )


def text(cells: dict[str, float] | None, scale: float, digits: int) -> str:
    if cells is None:
        return ""
    median, low, high = (f"{cells[k] * scale:.{digits}f}" for k in ("median", "min", "max"))
    return f"{median} [{low} .. {high}]"


if __name__ == "__main__":
    main()
