"""The measurement of the host's time: its rows, and what they add up to. On a CPU it runs small."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ring_flash_attn.backends import launch
from ring_flash_attn.core import peer_memory

BENCHMARK = Path(__file__).parents[1] / "benchmark"
sys.path.insert(0, str(BENCHMARK))

import driver_clock  # noqa: E402
import host_time  # noqa: E402
import rows  # noqa: E402
import stand_in  # noqa: E402
from driver_clock import DriverClock  # noqa: E402

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
        # On a CPU there is no driver; else a hop takes some of it.
        assert (us["us_driver"] > 0) == torch.cuda.is_available()
        assert us["us_driver"] < us["us_queued"]


def test_the_clock_counts_what_it_is_given_and_nothing_else(monkeypatch):
    seconds = iter([1.0, 1.5, 7.0, 7.25])
    monkeypatch.setattr(driver_clock.time, "perf_counter", lambda: next(seconds))
    clock = DriverClock()
    half = clock.timed(lambda x: x / 0 if x == 2 else x)
    assert half(1) == 1 and clock.us == 0.5e6
    with pytest.raises(ZeroDivisionError):
        half(2)
    assert clock.us == 0.75e6


def test_what_calls_the_driver_is_found(monkeypatch):
    stand_in = SimpleNamespace(_batch=len, _write=len, _copy=len)
    started = object.__new__(launch._Direct)
    started._start = len
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peer_memory, "_driver", lambda: stand_in)
    with driver_clock.driver_clock() as clock:
        assert started._start("four") == stand_in._batch("four") == stand_in._copy("four") == 4
        assert clock.us > 0 and hasattr(torch.cuda.Event.record, "__wrapped__")
    assert started._start is stand_in._write is len
    assert not hasattr(torch.cuda.Event.record, "__wrapped__")


def test_what_is_timed_is_as_before_afterwards(monkeypatch):
    class Entry:
        def call(self):
            return 7

    monkeypatch.setattr(driver_clock, "_entries", lambda: [(Entry, "call"), (Entry, "call")])
    before = Entry.call
    with driver_clock.driver_clock() as clock:
        assert Entry().call() == 7
        assert clock.us > 0 and Entry.call is not before
    assert Entry.call is before


def test_waits_of_a_stand_in_hold_nobody():
    class Driver:
        run = write = copy = None

        def prepare(self, operations):
            return operations

    wait, write = peer_memory._WAIT, peer_memory._WRITE
    prepared = stand_in.Unheld(Driver()).prepare([(wait, 8, 1), (write, 8, 1), (write, 8, 0)])
    assert prepared == [(wait, 8, 0), (write, 8, 1), (write, 8, 0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_stand_in_for_others_needs_a_gpu_for_the_one():
    with pytest.raises(NotImplementedError, match="GPU"):
        stand_in.join(4)


def test_a_stand_in_takes_no_messages(capsys):
    given = ["--stand-in", "4"]
    assert host_time.parse(given).exchanges == ["copy-engine"]
    assert host_time.parse([*given, "--exchanges", "copy-engine"]).exchanges == ["copy-engine"]
    with pytest.raises(SystemExit):
        host_time.parse([*given, "--exchanges", "ring"])
    assert "copy-engine" in capsys.readouterr().err


@pytest.mark.gpu
def test_one_of_four_ranks_on_one_gpu(tmp_path):
    path = tmp_path / "host.csv"
    command = [sys.executable, str(BENCHMARK / "host_time.py"), "--stand-in", "4", "--repeats", "5"]
    command += ["--csv", str(path), "--run-id", "r1", "--tree", "t1", "--commit", "c1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = rows.read(path, rows.HOST)
    assert [row["stand_in"] for row in found] == ["1"] * 4
    for row in found:
        assert row["world_size"] == "4" and float(row["us_per_hop"]) > 0


def test_rows_of_before_have_no_driver(tmp_path):
    path = tmp_path / "host.csv"
    path.write_text((BENCHMARK / "results" / "host.csv").read_text())
    old = rows.read(path, rows.HOST)
    assert old[0]["us_python_per_hop"] == "" and old[0]["stand_in"] == "0"
    assert set(old[0]) == set(rows.HOST)
