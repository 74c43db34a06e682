"""A run without a GPU must not pass by skipping: the rule of conftest.py, on planted files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rule is for runs without")

GPU_ONLY = "import pytest\n@pytest.mark.gpu\ndef test_on_gpu():\n    assert True\n"
ALSO_ON_CPU = GPU_ONLY + "@pytest.mark.kernel\ndef test_in_the_interpreter():\n    assert True\n"


def run(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess:
    for name in ("conftest.py", "quick_interpreter.py"):
        shutil.copy(Path(__file__).with_name(name), folder)
    (folder / "test_planted.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\n")
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    return subprocess.run(
        [*command, *arguments, "."],
        cwd=folder,
        env=inherited | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["one process", "two"])
def test_a_file_of_gpu_tests_that_ran_nothing_fails_the_run(tmp_path: Path, arguments):
    if arguments:
        pytest.importorskip("xdist")
    result = run(tmp_path, GPU_ONLY, *arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "no case ran on the CPU in test_planted.py" in result.stdout


def test_a_case_on_the_cpu_is_enough(tmp_path: Path):
    result = run(tmp_path, ALSO_ON_CPU)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_chosen_part_of_the_tests_is_left_alone(tmp_path: Path):
    assert run(tmp_path, GPU_ONLY, "-m", "gpu").returncode == 0
