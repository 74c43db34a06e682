"""Draw the newest runs of the CSV files: `python benchmark/plot.py`.

Writes kernels.svg and ring.svg (or .png) into benchmark/results. Needs matplotlib.
"""

import argparse
import sys
from pathlib import Path

import rows
from report import case_name, kernel_name, layout_name, mask_name

COLORS = {
    **{"triton": "#1b6ca8", "triton + state": "#7fb2d9", "native-aten": "#f0b9a0"},
    **{"triton, copy engine": "#12324a"},
    **{"triton-portable": "#0b3c5d", "triton-portable + state": "#4a7fa8"},
    **{"fa2": "#d9d9d9", "cudnn": "#969696", "fa3": "#4d4d4d", "fa4": "#111111"},
    **{"native-fa2": "#e08f6c", "native-fa3": "#c0532b"},
    **{"upstream-fa2": "#b9d8a8", "upstream-fa3": "#5b9a43"},
}
Bars = dict[str, dict[str, float]]  # TFLOP/s by case, then by kernel


def bars(found: list[dict[str, str]], columns: tuple[str, ...], pass_: str) -> Bars:
    """Return the TFLOP/s of one pass of a file's rows, in the order of the file."""
    speed = "tflops" if columns == rows.KERNELS else "tflops_per_gpu"
    result: Bars = {}
    for row in found:
        if row["pass"] == pass_:
            case = f"{case_name(row)}\n{mask_name(row)}"
            case += f", {layout_name(row)}, P {row['world_size']}" if "layout" in row else ""
            result.setdefault(case, {})[kernel_name(row)] = float(row[speed])
    return result


def draw(found: list[dict[str, str]], columns: tuple[str, ...], path: Path) -> None:
    """Draw one panel a pass, one group a case, one bar a kernel."""
    import matplotlib

    matplotlib.use("Agg")
    # Equal rows give an equal file.
    matplotlib.rcParams["svg.hashsalt"] = "ring_flash_attn"
    from matplotlib import pyplot

    passes = list(dict.fromkeys(row["pass"] for row in found))
    panels = [(name, bars(found, columns, name)) for name in passes]
    most = max(len(cases) for _, cases in panels)
    size = (max(7.0, 1.9 * most + 1.5), 3.4 * len(panels) + 0.6)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, squeeze=False)
    for axis, (name, cases) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, cases)
        axis.set_ylabel(f"{name}: TFLOP/s{'' if columns == rows.KERNELS else ' per GPU'}")
    gpu, date = found[-1]["gpu"], found[-1]["date"]
    figure.suptitle(f"{gpu}, torch {found[-1]['torch']}, triton {found[-1]['triton']}, {date}")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


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
    pictures = (
        ("kernels", rows.read(options.kernels, rows.KERNELS), rows.KERNELS),
        ("ring", batches, rows.RING),
        ("packed", packed, rows.RING),
    )
    for stem, measured, columns in pictures:
        found = rows.newest_run(measured)
        if not found:
            print(f"{stem}: nothing measured yet")
            continue
        path = options.to / f"{stem}.{options.format}"
        draw(found, columns, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
