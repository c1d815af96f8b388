"""High dynamic range video to the standard range that models and screens expect."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

PQ = 16
"""Transfer characteristic SMPTE ST 2084 (HDR10, Dolby Vision), as numbered in ITU-T H.273."""
HLG = 18
"""Transfer characteristic ARIB STD-B67 (hybrid log-gamma), as numbered in ITU-T H.273."""
SDR_WHITE_NITS = 203.0
"""Luminance of diffuse white in HDR material (ITU-R BT.2408)."""
KNEE = 0.8

# Linear light, BT.2020 to BT.709 primaries (ITU-R BT.2087).
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)


def tone_map(image: NDArray[np.uint16], transfer: int) -> NDArray[np.uint8]:
    """BT.2020 signal to sRGB: uint16 [H, W, 3] (full range) -> uint8 [H, W, 3].

    Values up to 0.8 of diffuse white keep their brightness; highlights above it are compressed, not cut.

    Args:
        transfer: `PQ` or `HLG`.
    """
    linear = _linear_light(transfer)[image] @ BT2020_TO_BT709.T
    np.maximum(linear, 0, out=linear)
    over = np.maximum(linear - KNEE, 0)
    compressed = np.minimum(linear, KNEE) + (1 - KNEE) * over / (over + (1 - KNEE))
    result: NDArray[np.uint8] = _srgb_table()[(compressed * 4095 + 0.5).astype(np.uint16)]
    return result


@cache
def _linear_light(transfer: int) -> NDArray[np.float32]:
    """Linear light over diffuse white for each 16-bit signal value: float32 [65536]."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:  # SMPTE ST 2084
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        nits = 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    elif transfer == HLG:  # ITU-R BT.2100, system gamma 1.2 at a nominal peak of 1000 nits, applied per channel
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        nits = 1000 * scene**1.2
    else:
        raise ValueError(f"transfer {transfer} is not one of high dynamic range")
    return (nits / SDR_WHITE_NITS).astype(np.float32)


@cache
def _srgb_table() -> NDArray[np.uint8]:
    """sRGB value of each of 4096 steps of linear light: uint8 [4096]."""
    linear = np.arange(4096) / 4095
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded + 0.5).astype(np.uint8)
