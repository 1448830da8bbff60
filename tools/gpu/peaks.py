"""Dense bf16 peaks of GPUs in TFLOP/s, by torch's device name; from the makers' data sheets, without sparsity."""

from __future__ import annotations

import re

PEAKS_TFLOPS = (  # the first name that occurs as a word wins: variants come before the plain model
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.4),
    ("MI250X", 383.0),
)


def peak_tflops(device_name: str) -> float | None:
    """The peak of a GPU; None where the name is unknown."""
    return next((peak for name, peak in PEAKS_TFLOPS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE)), None)
