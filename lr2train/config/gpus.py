"""Dense bf16 peaks of GPUs in TFLOP/s, by the device name that torch reports or a part of it, such as H200.

One table for three readers: `hardware.gpu` of an estimate, `mfu` of a training run, and the targets of
``tools.gpu.check``. The figures are those of the makers' data sheets, without sparsity and with fp32 accumulation:

- NVIDIA: data sheets of A100, A30, A40, A10, H100, H200, GH200, L4, L40, L40S, HGX B200 and B300, GB200 and GB300 NVL72
  (per GPU). GeForce and RTX: appendices of the Ampere GA102, Ada and RTX Blackwell architecture white papers.
  A10G: the table of AWS's g5 instances. H20 and H800: resellers' sheets, as NVIDIA publishes none.
- AMD: data sheets of Instinct MI250X, MI300X, MI325X, MI350X and MI355X. torch shows each of the two dies of an MI250X
  as a device, so a device has half of the card's 383.

Choice: an unknown name has no peak, and no reader assumes another GPU's. Cost: a new GPU needs a line here.
"""

from __future__ import annotations

import re

PEAKS_TFLOPS = (  # the first name that occurs as a word wins: variants come before the plain model
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
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
    ("MI355X", 2516.6),
    ("MI350X", 2306.9),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),
)


_NOT_THE_WHOLE_GPU = r"\bMIG\b|\bLaptop\b|\b4090 D\b"  # a slice of a GPU, or a smaller GPU of the same name


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU, TFLOP/s; None where it is unknown."""
    if re.search(_NOT_THE_WHOLE_GPU, device_name, re.IGNORECASE):
        return None
    return next((peak for name, peak in PEAKS_TFLOPS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE)), None)
