"""Imported before libraries that import torchvision where they find it, and of which these examples use nothing that needs it.

Its compiled half does not load beside another build of torch, as that of a CUDA build beside a CPU build, and then its import
fails for want of two operators. So they are declared.
"""

from __future__ import annotations

import torch

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # for as long as this module is there
    for _name in ("nms", "qnms"):
        LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
