"""Packaging. The only place that states the distribution's name and version."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="ring-flash-attn",
    version="0.2.0",
    description="Exact attention over a sequence sharded across GPUs, natively and in Triton",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["ring_flash_attn*"]),
    python_requires=">=3.10",
    # No upper pin on triton: each CUDA build of torch brings the one that it was built for.
    install_requires=["torch", 'triton; platform_system == "Linux"'],
    extras_require={
        "flash": ["flash-attn"],
        "benchmark": ["matplotlib", "tabulate"],
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist>=3.7",
            "numpy",
            "tabulate",
            "matplotlib",
        ],
        "dev": ["ruff==0.17.6", "pyright==1.1.414"],
    },
)
