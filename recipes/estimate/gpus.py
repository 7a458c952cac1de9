"""The GPUs that an estimate names."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Args:
        name: as the report writes it.
        gigabytes: of memory, taken as 10^9 bytes each. Drivers show somewhat more; what is more is
            left to the CUDA context, NCCL and fragmentation.
        tflops: peak of dense bfloat16 matrix products with float32 sums, in 10^12 FLOP/s.
    """

    name: str
    gigabytes: int
    tflops: float

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.gigabytes * 10**9


GPUS = {
    "h100": Gpu("H100", 80, 989.4),
    "h200": Gpu("H200", 141, 989.4),
    "b200": Gpu("B200", 180, 2250.0),
    "a100-80": Gpu("A100 80GB", 80, 312.0),
    "a100-40": Gpu("A100 40GB", 40, 312.0),
    "l40s": Gpu("L40S", 48, 362.05),
    "rtx4090": Gpu("RTX 4090", 24, 165.2),
}
"""From NVIDIA's data sheets (H100 SXM, H200 SXM, A100 SXM, L40S), the HGX B200 specification (a GPU
of the eight; half of the rate with sparsity) and the Ada architecture white paper (RTX 4090)."""


def data_sheet(device: str) -> Gpu | None:
    """The GPU by the name that its driver gives it, e.g. "NVIDIA H100 80GB HBM3"; None for one that
    is not in `GPUS`. PCIe, NVL and laptop boards are not: they run at lower rates.
    """
    words = set(re.split(r"[ -]", device))
    if words & {"PCIe", "NVL", "Laptop"}:
        return None
    return next((gpu for gpu in GPUS.values() if words >= set(gpu.name.split())), None)
