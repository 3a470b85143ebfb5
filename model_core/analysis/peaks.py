"""What a device could do at most: dense bfloat16 operations a second, by the name that its driver gives.

From the vendors' data sheets, without sparsity (which doubles what some of them print). In: a name; out: a number, or
None: of a device that is not here nothing is claimed. It measures nothing.
"""

from __future__ import annotations

#: (what the name holds, all of it, upper case) -> TFLOP/s. The first that fits counts, so the special stand first.
_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H100", "NVL"), 835.0),
    (("H100", "PCIE"), 756.0),
    (("H100",), 989.4),
    (("H200", "NVL"), 835.0),
    (("H200",), 989.4),
    (("H20",), 148.0),
    (("GH200",), 989.4),
    (("B200",), 2250.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("A40",), 149.7),
    (("A30",), 165.0),
    (("A10",), 125.0),
    (("L40S",), 362.05),
    (("L40",), 181.05),
    (("L4",), 121.0),
    (("RTX A6000",), 154.8),
    (("RTX 4090",), 165.2),
    (("RTX 3090",), 71.0),
    (("MI300X",), 1307.4),
    (("MI250X",), 383.0),
)


def peak_flops_per_second(device_name: str) -> float | None:
    """Of the device that calls itself so; None for one that is not in the table."""
    # Whole words: an "L4" must not be found in "L40S", nor an "A10" in "A100".
    words = device_name.upper().replace("-", " ").split()
    spoken = f" {' '.join(words)} "
    for parts, tera in _PEAKS:
        if all(f" {part} " in spoken for part in parts):
            return tera * 1e12
    return None
