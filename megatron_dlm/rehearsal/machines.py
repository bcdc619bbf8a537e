"""GPUs and how much of their data sheets training reaches: the constants of every prediction, in one table."""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    """One GPU in a node of eight with a network card for each; all rates per GPU and direction."""

    name: str
    memory: float
    """Bytes."""
    matmul: float
    """Peak of dense bf16 products, FLOP/s."""
    bandwidth: float
    """Peak of its memory, bytes/s."""
    nvlink: float
    """Bytes/s to other GPUs of the node."""
    network: float
    """Bytes/s to other nodes."""


# NVIDIA's data sheets of the SXM boards; network cards as in DGX systems (400 Gbit/s, A100: 200).
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("a100", 80e9, 312e12, 2.04e12, 300e9, 25e9),
        Machine("h100", 80e9, 989e12, 3.35e12, 450e9, 50e9),
        Machine("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9),
        Machine("b200", 180e9, 2250e12, 8e12, 900e9, 50e9),
    )
}

# Shares of the peaks that are taken to be reached. Nothing of it is measured by us: they are what public figures for
# an H100 come to (products 680 TFLOP/s, flash-attention 2 370 forward and 300 backward, elementwise kernels 2.6 TB/s,
# all-gather over NVLink 270 GB/s, over InfiniBand 45 GB/s).
MATMUL, ATTENTION, ATTENTION_BACKWARD = 0.69, 0.374, 0.303
BANDWIDTH, NVLINK, NETWORK = 0.78, 0.6, 0.9
# Seconds before the first byte of a collective, in a node and over several.
LATENCY, NETWORK_LATENCY = 10e-6, 30e-6
RESERVED = 3e9
"""Bytes for the CUDA context, NCCL's buffers, cuBLAS's workspaces and fragments."""
