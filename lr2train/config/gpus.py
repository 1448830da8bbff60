"""Dense bf16 peaks of GPUs in TFLOP/s and their memory in GiB, by the device name that torch reports or a part of it,
such as H200.

One table for three readers: `hardware.gpu` of an estimate, `mfu` of a training run, and the targets of
``tools.gpu.check``. The figures are those of the makers' data sheets, without sparsity and with fp32 accumulation:

- NVIDIA: data sheets of A100, A30, A40, A10, H100, H200, GH200, L4, L40, L40S, HGX B200 and B300, GB200 and GB300 NVL72
  (per GPU). GeForce and RTX: appendices of the Ampere GA102, Ada and RTX Blackwell architecture white papers.
  A10G: the table of AWS's g5 instances. H20 and H800: resellers' sheets, as NVIDIA publishes none.
- AMD: data sheets of Instinct MI250X, MI300X, MI325X, MI350X and MI355X. torch shows each of the two dies of an MI250X
  as a device, so a device has half of the card's 383, and half of its memory.
- Memory: what the driver shows, rounded: GDDR with error correction on has a sixteenth less than the product's name.
  A size in the name wins: A100-SXM4-40GB. Where one name stands for several sizes, there is none, but for A100 and
  A800: theirs is 80.

Choice: an unknown name has no figures, and no reader assumes another GPU's. Cost: a new GPU needs a line here.
"""

from __future__ import annotations

import re

# Name, peak, memory. The first name that occurs as a word wins: variants come before the plain model.
GPUS: tuple[tuple[str, float, float | None], ...] = (
    ("GB300", 2500.0, None),
    ("GB200", 2500.0, 185.0),
    ("B300", 2250.0, None),
    ("B200", 2250.0, 179.0),
    ("GH200", 989.4, None),
    ("H200 NVL", 835.5, 140.0),
    ("H200", 989.4, 140.0),
    ("H100 PCIe", 756.0, 80.0),
    ("H100 NVL", 835.5, 93.0),
    ("H100", 989.4, 80.0),
    ("H800", 989.4, 80.0),
    ("H20", 148.0, None),
    ("A100", 312.0, 80.0),
    ("A800", 312.0, 80.0),
    ("A30", 165.0, 24.0),
    ("A40", 149.7, 45.0),
    ("A10G", 70.0, 22.5),
    ("A10", 125.0, 22.5),
    ("L40S", 362.0, 45.0),
    ("L40", 181.0, 45.0),
    ("L4", 121.0, 22.5),
    ("RTX 6000 Ada", 364.2, 48.0),
    ("RTX A6000", 154.8, 48.0),
    ("RTX 5090", 209.5, 32.0),
    ("RTX 4090", 165.2, 24.0),
    ("RTX 3090", 71.0, 24.0),
    ("MI355X", 2516.6, 288.0),
    ("MI350X", 2306.9, 288.0),
    ("MI325X", 1307.4, 256.0),
    ("MI300X", 1307.4, 192.0),
    ("MI250X", 191.5, 64.0),
)


_NOT_THE_WHOLE_GPU = r"\bMIG\b|\bLaptop\b|\b4090 D\b"  # a slice of a GPU, or a smaller GPU of the same name


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU, TFLOP/s; None where it is unknown."""
    return _figures(device_name)[0]


def memory_gib(device_name: str) -> float | None:
    """The memory of a GPU, GiB; None where it is unknown."""
    known = _figures(device_name)[1]
    told = re.search(r"(?<!\w)(\d+) ?Gi?B\b", device_name, re.IGNORECASE)
    return float(told[1]) if known and told else known  # GH200 480GB: the memory of its CPU


def _figures(device_name: str) -> tuple[float | None, float | None]:
    if re.search(_NOT_THE_WHOLE_GPU, device_name, re.IGNORECASE):
        return None, None
    alike = (figures for name, *figures in GPUS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE))
    peak, memory = next(alike, (None, None))
    return peak, memory
