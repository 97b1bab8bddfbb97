"""Tell NaN and infinity from raw little-endian bytes, at memory speed and without torch."""

from __future__ import annotations

import numpy as np

# A float is NaN or infinite exactly when all of these bits are set: dtype → (unsigned type, those bits). They are the
# exponent's; of the 8-bit types without infinity, those of NaN.
_EXPONENT = {"F64": ("<u8", 0x7FF0_0000_0000_0000), "F32": ("<u4", 0x7F80_0000), "F16": ("<u2", 0x7C00),
             "BF16": ("<u2", 0x7F80), "F8_E5M2": ("<u1", 0x7C), "F8_E4M3": ("<u1", 0x7F), "F8_E8M0": ("<u1", 0xFF)}


def all_finite(data: memoryview | bytes, dtype: str) -> bool:
    """Whether no value is NaN or infinite; `dtype` is a safetensors name, integers are always finite."""
    if dtype not in _EXPONENT or not len(data):
        return True
    unsigned, exponent = _EXPONENT[dtype]
    values = np.frombuffer(data, dtype=unsigned)
    return bool((values & values.dtype.type(exponent)).max() != exponent)
