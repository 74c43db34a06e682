"""Rewriting a row of the launch tables: that row changes, and nothing else does."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmark"))

import launch_table

from ring_flash_attn.kernels.configs import LaunchConfig
from ring_flash_attn.kernels.hopper.configs import BackwardConfig, ForwardConfig, WideConfig

ALL_TABLES = {"_ROWS", "_DOCUMENT_ROWS", "_INTERPRETED", "FORWARD", "BACKWARD", "WIDE"}
ROWS = [
    ((90, 128, "bfloat16", "dq"), LaunchConfig(64, 64, 4, 2, tma=True, tflops=560, gpu="H100")),
    ((90, 64, "bfloat16", "dkv"), LaunchConfig(64, 64, 8, 3, True, 4, 400, "H100", "2026-12-01")),
    ((90, 128, "bfloat16", "dkv"), LaunchConfig(64, 64, 8, 3, tma=True)),
    ((100, 128, "bfloat16", "dq"), LaunchConfig(64, 64, 8, 3, tma=True)),
    (64, ForwardConfig(2, 128, 1, 2, ping_pong=False, rescale_late=True)),
    (128, BackwardConfig(128, 1, 1, 1, rotate=True, spills=100, wins=False)),
    (256, WideConfig(stages=2, spills=4)),
]


@pytest.mark.parametrize(("key", "config"), ROWS, ids=str)
def test_rewriting_changes_the_row_and_nothing_else(key, config, tmp_path: Path):
    source = launch_table.file_of(config).read_text()
    table = launch_table.TABLES[type(config)]
    comment = "" if isinstance(config, LaunchConfig) else "1 / 2 TFLOP/s, H100."
    text = launch_table.rewritten(source, key, config, comment)
    before, after = evaluated(source), evaluated(text)
    assert after[table] == {**before[table], key: config}
    for name in ALL_TABLES:
        assert name == table or before.get(name) == after.get(name)
    assert_formatted(text, tmp_path / "configs.py")
    kept = [line for line in source.splitlines() if line in text.splitlines()]
    assert len(kept) >= len(source.splitlines()) - 3
    assert [x for x in source.splitlines() if "#" in x] == [
        x for x in text.splitlines() if "#" in x and "tuned:" not in x
    ]
    assert text.count(f"# {key} tuned: 1 / 2 TFLOP/s, H100.\n") == bool(comment)
    again = launch_table.rewritten(text, key, config, comment and "3 / 4 TFLOP/s.")
    assert again == text.replace("1 / 2 TFLOP/s, H100.", "3 / 4 TFLOP/s.")
    if key in before[table]:
        back = launch_table.rewritten(text, key, before[table][key])
        lines = [x for x in back.splitlines(keepends=True) if "tuned:" not in x]
        assert "".join(lines) == source


def test_a_source_without_the_table_is_an_error():
    with pytest.raises(ValueError, match="FORWARD"):
        launch_table.rewritten("FORWARD = dict()\n", 64, ForwardConfig(2, 64, 1, 1, True))


def evaluated(source: str) -> dict:
    """Return the tables of a source, their rows as this process's classes."""
    names = {"__name__": "ring_flash_attn.kernels.configs"}
    exec(compile(source, "configs.py", "exec"), names)
    known = {x.__name__: x for x in (LaunchConfig, ForwardConfig, BackwardConfig, WideConfig)}

    def own(config):
        return known[type(config).__name__](**vars(config))

    return {x: {k: own(v) for k, v in names[x].items()} for x in ALL_TABLES & names.keys()}


def assert_formatted(text: str, path: Path) -> None:
    assert all(len(line) <= 100 for line in text.splitlines())
    ruff = pytest.importorskip("ruff", reason="ruff is not installed")
    path.write_text(text)
    command = [ruff.find_ruff_bin(), "format", "--check", "--line-length", "100", str(path)]
    assert not subprocess.run(command, capture_output=True).returncode


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_gpus_have_short_names(device: str, name: str):
    assert launch_table.gpu_name(device) == name
