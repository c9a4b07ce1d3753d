"""The tables of docs/speed.md, written from the files of results: no figure there is typed by hand.

python benchmarks/table.py            rewrites what stands between the two marks in docs/speed.md
python benchmarks/table.py --check    ends with 1 where it is not what the files say
"""

import argparse
import json
from pathlib import Path
import sys

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "speed.md"
BEGIN, END = "<!-- from benchmarks/results -->\n", "<!-- end -->\n"
WIDE = {"per_s": 0, "_s": 2}  # digits behind the point, by the end of a figure's name


def table(result: dict) -> str:
    """One file of results as a table with what it was measured on."""
    rows = ["| against | figure | the peer | cloche | times as good (95 %) | rounds |", "|---|---|---:|---:|---:|---:|"]
    for c in result["comparisons"]:
        sides = c["a"] if c["b"] == "cloche" else f"{c['a']} ({c['b']})"
        for name, unit in c["units"].items():
            f = c["figures"][name]
            rows.append(
                f"| {sides} | {unit} | {number(f['a_median'])} | {number(f['b_median'])} "
                f"| **{f['ratio']:.2f}** ({f['low']:.2f}–{f['high']:.2f}) | {f['n']} |"
            )
    lines = [f"**{result['job']}**", "", *rows, "", machine(result)]
    remarks = list(dict.fromkeys(text for c in result["comparisons"] for text in c["remarks"]))
    return "\n".join([*lines, *(f"Note: {text}." for text in remarks)]) + "\n"


def machine(result: dict) -> str:
    """Where and when, with the limits measured beside."""
    hardware, limits = result["hardware"], [m for c in result["comparisons"] for m in c["limits"]]
    tops = {k: [m["matmul_gflop_per_s"][k] for m in limits] for k in ("fp32_1024", "bf16_1024")}
    spans = ", ".join(f"{k.partition('_')[0]} {min(v):.0f}–{max(v):.0f} GFLOP/s" for k, v in tops.items())
    copy = [m["copy_gb_per_s"] for m in limits]
    torch = result["versions"]["b"]["torch"]
    where = f"{hardware['cores']} cores of {hardware['cpu']}, PyTorch {torch}"
    beside = f"limits beside it: {spans}, copying {min(copy):.0f}–{max(copy):.0f} GB/s"
    return f"{where}; {beside}; commit {result['commit'][:7]}, {result['started'][:10]}."


def number(x: float) -> str:
    return f"{x:,.0f}".replace(",", " ") if x >= 100 else f"{x:.3g}"


def loop_table(result: dict) -> str:
    """What the loop costs: ratios of CPU time, less is better."""
    rows = ["| recipe | bare loop, ms of CPU a step | cloche | more (95 %) |", "|---|---:|---:|---:|"]
    for c in (c for c in result["comparisons"] if "figures" in c):
        f = c["figures"]["cpu_s_per_step"]
        more = ", ".join(f"{100 * (f[k] - 1):+.1f} %" for k in ("low", "high"))
        rows.append(
            f"| {c['recipe']} | {1e3 * f['a_median']:.3g} | {1e3 * f['b_median']:.3g} | **{100 * (f['ratio'] - 1):+.1f} %** ({more}) |"
        )
    saves = [f"Checkpoints took {100 * c['share']:.2f} % of a run's time." for c in result["comparisons"] if "share" in c]
    return "\n".join(["**What the loop costs over a bare one**", "", *rows, "", *saves]) + "\n"


def fast_table(result: dict) -> str:
    """mnist-fast beside the script's five epochs."""
    script, rows = result["script"], ["| | accuracy | seconds |", "|---|---:|---:|"]
    rows.append(f"| five epochs of the script, as shipped | {script['accuracy']:.2%} | {script['seconds']:.0f} |")
    rows += [
        f"| `cloche train mnist-fast`, seed {r['seed']}, the whole command | {r['accuracy']:.2%} | {r['wall_s']:.1f} |"
        for r in result["runs"]
    ]
    return "\n".join([f"**{result['job']}: {result['ratio']:.1f} times as soon**", "", *rows]) + "\n"


def page() -> str:
    """docs/speed.md as it should be. Raises: SystemExit where the marks are missing."""
    text = PAGE.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{PAGE.name} lacks {BEGIN.strip()} or {END.strip()}")
    parts = []
    for name in ("primer", "frameworks", "families"):
        if (file := HERE / "results" / f"{name}.json").exists():
            parts.append(table(json.loads(file.read_text())))
    for name, made in (("loop", loop_table), ("fast", fast_table)):
        if (file := HERE / "results" / f"{name}.json").exists():
            parts.append(made(json.loads(file.read_text())))
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + rest.split(END)[1]


def main() -> None:
    p = argparse.ArgumentParser(description="Writes the tables of docs/speed.md.")
    p.add_argument("--check", action="store_true", help="change nothing; 1 where the page is not what the files say")
    if p.parse_args().check:
        sys.exit(PAGE.read_text() != page() and f"{PAGE.name} is not what the results say: python benchmarks/table.py")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
