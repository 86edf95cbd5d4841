"""Makes ``import torchvision`` work, for libraries that import it. The examples use nothing that needs it.

The import fails if torchvision's compiled part does not load, for example a CUDA build beside a CPU build of torch, because two
operators are missing. This module declares them. Import it before those libraries.
"""

from __future__ import annotations

import torch

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # the operators exist as long as this object
    for _name in ("nms", "qnms"):
        LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
