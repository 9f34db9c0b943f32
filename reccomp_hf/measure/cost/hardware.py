"""Peak rates and memory of accelerators by their datasheets: the ceilings of the cost model."""

from __future__ import annotations

import dataclasses

DTYPES = {"fp16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes per number. As in the paper's table, weights, activations and cache all have the same width."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """An accelerator's ceilings, for dense matrices.

    Args:
        name: The name that `reccomp-hf cost --hardware` accepts.
        fp16: Operations per second in 16-bit floating point with tensor cores.
        int8: Operations per second in 8-bit integers with tensor cores. `None` without such cores: quantised numbers
            are then computed in 16 bit.
        bandwidth: Memory bandwidth in bytes per second.
        memory: Memory in bytes.
        source: The source of the numbers.
    """

    name: str
    fp16: float
    int8: float | None
    bandwidth: float
    memory: float
    source: str

    def peak(self, dtype: str) -> float:
        """Operations per second; 4-bit numbers are computed at the rate of 8-bit ones, as in the paper's table."""
        return self.fp16 if dtype == "fp16" else self.int8 or self.fp16


HARDWARE: dict[str, Hardware] = {
    entry.name: entry
    for entry in (
        # The paper's card: the bandwidth in its numbers is that of 40 GB.
        Hardware("A100", 312e12, 624e12, 1555e9, 40e9, "NVIDIA A100 datasheet, 40 GB"),
        Hardware("A100-80GB", 312e12, 624e12, 2039e9, 80e9, "NVIDIA A100 datasheet, 80 GB SXM"),
        # NVIDIA prints these two with sparsity; dense matrices get half.
        Hardware("H100", 989.5e12, 1979e12, 3350e9, 80e9, "NVIDIA H100 datasheet, SXM, without sparsity"),
        Hardware("H200", 989.5e12, 1979e12, 4800e9, 141e9, "NVIDIA H200 datasheet, SXM, without sparsity"),
        Hardware("V100", 125e12, None, 900e9, 32e9, "NVIDIA V100 datasheet, SXM2 32 GB"),
        Hardware("L4", 121e12, 242.5e12, 300e9, 24e9, "NVIDIA L4 datasheet, without sparsity"),
        # With 32-bit accumulation, as in torch.
        Hardware("RTX 4090", 165.2e12, 660.6e12, 1008e9, 24e9, "NVIDIA Ada architecture whitepaper, appendix A"),
    )
}
"""Name -> accelerator."""


def get_hardware(name: str | Hardware) -> Hardware:
    """The accelerator of that name, ignoring case and spaces; a [`Hardware`] is returned as it is.

    Raises:
        ValueError: The name is unknown.
    """
    if isinstance(name, Hardware):
        return name
    for known, hardware in HARDWARE.items():
        if known.replace(" ", "").lower() == name.replace(" ", "").lower():
            return hardware
    raise ValueError(f"Unknown hardware {name!r}; known are {', '.join(HARDWARE)}.")


def get_width(dtype: str) -> float:
    """Bytes per number of that type.

    Raises:
        ValueError: The type is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; known are {', '.join(DTYPES)}.")
    return DTYPES[dtype]


__all__ = ["DTYPES", "HARDWARE", "Hardware", "get_hardware", "get_width"]
