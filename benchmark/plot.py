"""Draw the newest runs of the CSV files: `python benchmark/plot.py`.

Writes kernels.svg, coverage.svg, ring.svg and packed.svg (or .png) into benchmark/results. Needs
matplotlib.
"""

import argparse
import sys
from pathlib import Path

import rows
from report import case_name, kernel_mask_name, kernel_name, layout_name, mask_name

COLORS = {
    **{"triton": "#1b6ca8", "triton + state": "#7fb2d9", "native-aten": "#f0b9a0"},
    **{"triton, copy engine": "#12324a"},
    **{"triton-portable": "#0b3c5d", "triton-portable + state": "#4a7fa8"},
    **{"fa2": "#d9d9d9", "cudnn": "#969696", "fa3": "#4d4d4d", "fa4": "#111111"},
    **{"native-fa2": "#e08f6c", "native-fa3": "#c0532b"},
    **{"upstream-fa2": "#b9d8a8", "upstream-fa3": "#5b9a43"},
}
MARKERS = {"fa2": "s", "cudnn": "^", "fa3": "D", "fa4": "v"}
Bars = dict[str, dict[str, float]]  # TFLOP/s by case, then by kernel


def bars(found: list[dict[str, str]], columns: tuple[str, ...], pass_: str) -> Bars:
    """Return the TFLOP/s of one pass of a file's rows, in the order of the file."""
    speed = "tflops" if columns == rows.KERNELS else "tflops_per_gpu"
    result: Bars = {}
    for row in found:
        if row["pass"] == pass_:
            if "layout" in row:
                case = f"{case_name(row)}\n{mask_name(row)}"
                case += f", {layout_name(row)}, P {row['world_size']}"
            else:
                case = f"{case_name(row)}\n{kernel_mask_name(row)}"
            result.setdefault(case, {})[kernel_name(row)] = float(row[speed])
    return result


def draw(found: list[dict[str, str]], columns: tuple[str, ...], path: Path) -> None:
    """Draw one panel a pass, one group a case, one bar a kernel."""
    pyplot = _pyplot()
    passes = list(dict.fromkeys(row["pass"] for row in found))
    panels = [(name, bars(found, columns, name)) for name in passes]
    most = max(len(cases) for _, cases in panels)
    size = (max(7.0, 1.9 * most + 1.5), 3.4 * len(panels) + 0.6)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, squeeze=False)
    for axis, (name, cases) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, cases)
        axis.set_ylabel(f"{name}: TFLOP/s{'' if columns == rows.KERNELS else ' per GPU'}")
    figure.suptitle(_origin(found))
    figure.tight_layout()
    _save(figure, path)


def draw_coverage(found: list[dict[str, str]], path: Path) -> None:
    """Draw one panel a pass, side by side: one line a case, one dot a kernel, the ceiling a band.

    Cases are ordered by head dim, then as in the file.
    """
    pyplot = _pyplot()
    found = sorted(found, key=lambda row: (int(row["head_dim"]), kernel_mask_name(row)))
    passes = list(dict.fromkeys(row["pass"] for row in found))
    panels = [(name, bars(found, rows.KERNELS, name)) for name in passes]
    cases = list(dict.fromkeys(case for _, of_pass in panels for case in of_pass))
    ceilings = [float(row["ceiling"]) for row in found if row["ceiling"]]
    size = (4.2 * len(panels) + 2.6, 0.2 * len(cases) + 1.6)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (name, of_pass) in zip(axes[0], panels, strict=True):
        _dots(axis, of_pass, cases)
        if ceilings:
            axis.axvspan(min(ceilings), max(ceilings), color="#d62728", alpha=0.3, label="matmul")
        speeds = [speed for of_case in of_pass.values() for speed in of_case.values()]
        axis.set_xlim(0, 1.03 * max(*speeds, *ceilings, 1.0))
        axis.set_xlabel(f"{name}: TFLOP/s")
    axes[0, 0].set_yticks(range(len(cases)), [x.replace("\n", " ") for x in cases], fontsize=7)
    axes[0, 0].set_ylim(len(cases) - 0.5, -0.5)
    marks = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.suptitle(_origin(found), fontsize=9)
    figure.tight_layout(rect=(0, 0.5 / size[1], 1, 1))
    figure.legend(marks.values(), marks, fontsize=8, ncols=len(marks), loc="lower center")
    _save(figure, path)


def _dots(axis, of_pass: Bars, cases: list[str]) -> None:
    for name in dict.fromkeys(name for of_case in of_pass.values() for name in of_case):
        speeds = [of_pass.get(case, {}).get(name) for case in cases]
        found = [(speed, y) for y, speed in enumerate(speeds) if speed is not None]
        again = name.endswith("+ state")
        axis.plot(
            *zip(*found, strict=True),
            marker=MARKERS.get(name, "o"),
            linestyle="none",
            markersize=5 if name.startswith("triton") else 4,
            markerfacecolor="none" if again else COLORS.get(name),
            color=COLORS.get(name),
            label=name,
        )
    for y in range(1, len(cases)):
        if cases[y].split("\n")[0].split(",")[-1] != cases[y - 1].split("\n")[0].split(",")[-1]:
            axis.axhline(y - 0.5, color="#999999", linewidth=0.8)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    # Equal rows give an equal file.
    matplotlib.rcParams["svg.hashsalt"] = "ring_flash_attn"
    from matplotlib import pyplot

    return pyplot


def _origin(found: list[dict[str, str]]) -> str:
    last = found[-1]
    return f"{last['gpu']}, torch {last['torch']}, triton {last['triton']}, {last['date']}"


def _save(figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    _pyplot().close(figure)


def _panel(axis, cases: Bars) -> None:
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [x for x, case in enumerate(cases.values()) if name in case]
        heights = [case[name] for case in cases.values() if name in case]
        lefts = [x + (i - (len(names) - 1) / 2) * width for x in places]
        axis.bar(lefts, heights, width, label=name, color=COLORS.get(name))
    axis.set_xticks(range(len(cases)), list(cases), fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", type=Path, default=rows.KERNELS_CSV)
    parser.add_argument("--ring", type=Path, default=rows.RING_CSV)
    parser.add_argument("--to", type=Path, default=rows.RESULTS, help="folder of the pictures")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    batches, packed = rows.by_packing(rows.read(options.ring, rows.RING))
    kernels, covered = rows.by_packing(rows.read(options.kernels, rows.KERNELS))
    pictures = (
        ("kernels", kernels, rows.KERNELS),
        ("coverage", covered, rows.KERNELS),
        ("ring", batches, rows.RING),
        ("packed", packed, rows.RING),
    )
    for stem, measured, columns in pictures:
        found = rows.newest_run(measured)
        if not found:
            print(f"{stem}: nothing measured yet")
            continue
        path = options.to / f"{stem}.{options.format}"
        if stem == "coverage":
            draw_coverage(found, path)
        else:
            draw(found, columns, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
