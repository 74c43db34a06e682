"""The measurement of the host's time: its rows, and what they add up to. On a CPU it runs small."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmark"
sys.path.insert(0, str(BENCHMARK))

import rows  # noqa: E402

EXCHANGES = ("ring", "copy-engine") if torch.cuda.device_count() > 1 else ("ring",)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict[str, str]]:
    path = tmp_path_factory.mktemp("host") / "host.csv"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(BENCHMARK / "host_time.py"), "--csv", str(path), "--run-id", "r1"]
    command += ["--tree", "t1", "--commit", "c1", "--local-len", "32", "--repeats", "5"]
    command += ["--exchanges", *EXCHANGES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 4 * len(EXCHANGES)
    return rows.read(path, rows.HOST)


def test_a_row_for_each_exchange_packing_and_pass(measured):
    wanted = {(x, y, z) for x in EXCHANGES for y in ("batch", "stated") for z in ("fwd", "bwd")}
    assert {(row["exchange"], row["packing"], row["pass"]) for row in measured} == wanted
    assert len(measured) == len(wanted)
    for row in measured:
        given = [row[x] for x in ("run", "tree", "commit", "world_size", "local_len")]
        assert given == ["r1", "t1", "c1", "2", "32"]


def test_steps_and_hops_add_up(measured):
    for row in measured:
        us = {name: float(row[name]) for name in row if name.startswith("us_")}
        assert 0 < us["us_p20"] <= us["us_p50"] <= us["us_p80"]
        assert us["us_per_step"] == pytest.approx(us["us_p50"] / 2, rel=1e-4)
        hops = us["us_p50"] - us["us_one_rank"]
        assert us["us_per_hop"] == pytest.approx(hops, rel=1e-3, abs=1e-3 * us["us_p50"])
