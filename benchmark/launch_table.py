"""Rewrite one row of the checked-in launch tables, and leave all else as it stands."""

import ast
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path

from candidates import Config, Target, parsed
from tune_state import Verdict

from ring_flash_attn.kernels import configs
from ring_flash_attn.kernels.configs import LaunchConfig
from ring_flash_attn.kernels.hopper import configs as hopper_configs
from ring_flash_attn.kernels.hopper.configs import BackwardConfig, ForwardConfig, WideConfig

WIDTH = 100  # columns, as ruff formats
# How many fields of a row are written without their names.
POSITIONAL = {LaunchConfig: 4, ForwardConfig: 2, BackwardConfig: 0, WideConfig: 0}
TABLES = {
    LaunchConfig: "_ROWS",
    ForwardConfig: "FORWARD",
    BackwardConfig: "BACKWARD",
    WideConfig: "WIDE",
}


def file_of(config: Config) -> Path:
    """Return the file that holds a configuration's table."""
    module = configs if isinstance(config, LaunchConfig) else hopper_configs
    return Path(str(module.__file__))


def write(of: Target, best: Verdict, spills: int, shape: str, gpu: str, date: str) -> Path:
    """Put a candidate in the place of the checked-in row, with what was measured.

    Args:
        spills: bytes, of the candidate. shape: B,S,H/Hk of the measurement. gpu: the device.

    Returns:
        The file.
    """
    config = parsed(of, [best.candidate])[-1].config
    path, comment, key = file_of(config), "", of.head_dim
    if isinstance(config, LaunchConfig):
        # The best arch that this part takes rows of: sm_89 has those of sm_86.
        key = configs._row_archs(of.arch)[0], of.head_dim, "bfloat16", of.kernel
        speed = round(best.tflops["causal"])
        config = replace(config, spills=spills, tflops=speed, gpu=gpu_name(gpu), date=date)
    else:
        if not isinstance(config, ForwardConfig):
            config = replace(config, spills=spills)
        speeds = " / ".join(f"{x:.0f}" for x in best.tflops.values())
        masks = " / ".join(best.tflops)
        comment = f"{speeds} TFLOP/s {masks} ({shape}), {gpu_name(gpu)}, {date}."
    source = path.read_text(encoding="utf-8")
    path.write_text(rewritten(source, key, config, comment), encoding="utf-8")
    return path


def rewritten(source: str, key: object, config: Config, comment: str = "") -> str:
    """Return the source with one row changed, or added after the rows of its arch.

    Args:
        key: of the row in the table of `config`'s type.
        comment: what was measured, for a type without fields for it: `# KEY tuned: comment` above
            the row, in place of an earlier one.

    Raises:
        ValueError: the table is not a literal dict of this source.
    """
    table = TABLES[type(config)]
    lines = source.splitlines(keepends=True)
    node = _dict(source, table)
    keys = [ast.literal_eval(x) for x in node.keys if x is not None]
    if key in keys:
        index = keys.index(key)
        begin, end = node.keys[index], node.values[index]
        assert begin is not None and end.end_lineno is not None
        first, last = begin.lineno - 1, end.end_lineno - 1
        # To the end of the value; a comma, a brace and comments after it stay.
        before, after = lines[first][: begin.col_offset], lines[last][end.end_col_offset :]
        text = _row(before, key, config, after) + after
    else:
        last = first = _last_line_of(node, keys, key)
        text = lines[last] + _row("    ", key, config, ",\n") + ",\n"
    lines[first : last + 1] = [text]
    if comment:
        _put_comment(lines, first, key, comment)
    return "".join(lines)


def arguments(config: Config) -> list[str]:
    """Return the arguments of a row as they are written: those that are not the default."""
    written = []
    for position, field in enumerate(fields(config)):
        value = getattr(config, field.name)
        if position < POSITIONAL[type(config)]:
            written.append(_literal(value))
        elif field.default is MISSING or value != field.default:
            written.append(f"{field.name}={_literal(value)}")
    return written


def gpu_name(device: str) -> str:
    """Return the short name of a device, as rows have it: H100 of NVIDIA H100 80GB HBM3."""
    name = re.sub(r"^(NVIDIA|Tesla|GeForce|\s)+", "", device)
    return re.split(r"[-\s](?:\d+GB|SXM|PCIe|HBM)", name)[0]


def _dict(source: str, table: str) -> ast.Dict:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == table:
                return node.value
    raise ValueError(f"table: got a source without the literal dict {table}")


def _last_line_of(node: ast.Dict, keys: list, key: object) -> int:
    """Return the index of the last line of the row to add one after."""
    same = [i for i, x in enumerate(keys) if isinstance(key, tuple) and x[0] == key[0]]
    index = same[-1] if same else len(keys) - 1
    line = node.values[index].end_lineno
    assert line is not None
    return line - 1


def _row(before: str, key: object, config: Config, after: str) -> str:
    """Return `before` and the row, broken as ruff breaks it where it is too wide for `after`."""
    name, written = type(config).__name__, arguments(config)
    head = f"{before}{_literal(key)}: {name}("
    line = f"{head}{', '.join(written)})"
    if len(line) + len(after.partition("  #")[0].rstrip()) <= WIDTH:
        return line
    inner = " " * (len(before) - len(before.lstrip()) + 4)
    joined = f"{inner}{', '.join(written)}"
    body = joined if len(joined) <= WIDTH else "\n".join(f"{inner}{x}," for x in written)
    return f"{head}\n{body}\n{inner[4:]})"


def _put_comment(lines: list[str], first: int, key: object, comment: str) -> None:
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    start = f"{indent}# {_literal(key)} tuned: "
    text = f"{start}{comment}\n"
    if first and lines[first - 1].startswith(start):
        lines[first - 1] = text
    else:
        lines.insert(first, text)


def _literal(value: object) -> str:
    """Return a value as ruff formats it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))})"
    return f'"{value}"' if isinstance(value, str) else repr(value)
