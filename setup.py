"""Packages, dependencies and the console script. Exact versions are in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="megatron-dlm",
    version="0.1.0",
    description="Train masked diffusion language models on unforked megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_dlm", "megatron_dlm.*"]) + ["dlm_kernels"],
    # The folder kernels/ must not be a package itself: a published package has that name.
    package_dir={"dlm_kernels": "kernels/dlm_kernels"},
    package_data={"megatron_dlm.generation": ["trace_page.html"]},
    install_requires=[
        "torch>=2.9",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "jsonargparse[signatures]>=4.49",
        "sentencepiece>=0.2.0",
        "tqdm>=4.66",
        "rich>=14.0",
    ],
    extras_require={
        "gpu": ["triton>=3.6", "transformer-engine[pytorch]>=2.0"],
        "hf": [
            "transformers>=5.0",
            "accelerate>=1.1",  # transformers' Trainer and lm-eval's model `hf` need it
            "tokenizers>=0.22",
            "safetensors>=0.5",
            "datasets>=4.0",
            "pyarrow>=18.0",
        ],
        "eval": ["lm-eval>=0.4.9"],
        "log": ["tensorboard>=2.18", "matplotlib>=3.9"],
        "dev": [
            "pytest>=8.0",
            "hypothesis>=6.100",
            "pyte>=0.8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
            "setuptools>=68",
            "triton>=3.6",
        ],
    },
    entry_points={"console_scripts": ["megatron-dlm = megatron_dlm.cli:main"]},
)
