"""What GPUs compute fp32 in."""

from __future__ import annotations

from typing import Literal

import torch


def set_fp32_math(math: Literal["ieee", "tf32"]) -> None:
    """Have GPUs multiply fp32 matrices and convolve alike (``train.fp32_math``).

    torch's own defaults differ: convolutions in TF32, matrix products in IEEE fp32 (2.15).
    """
    torch.backends.cudnn.allow_tf32 = math == "tf32"
    torch.set_float32_matmul_precision("high" if math == "tf32" else "highest")
