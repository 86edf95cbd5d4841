"""The losses of other libraries, fused: their constructors, their calls, their conventions, and this package's kernels.

One module for each library, named like it, so that a training script changes one import line::

    from lightly.loss import NTXentLoss                   ->  from clop_kernels.compat.lightly import NTXentLoss
    from losses import SupConLoss  (SupContrast)          ->  from clop_kernels.compat.supcontrast import SupConLoss
    from pytorch_metric_learning.losses import SupConLoss ->  from clop_kernels.compat.pytorch_metric_learning import SupConLoss
    from open_clip import ClipLoss                        ->  from clop_kernels.compat.open_clip import ClipLoss
    from losses import CLOPLoss  (the paper's code)       ->  from clop_kernels.compat.clop import CLOPLoss

Each class gives the library's own values and gradients, to rounding, and needs none of these libraries. What cannot be had
without an N x N array raises NotImplementedError, which names the option and what to do. Every class takes ``backend=`` as
:func:`clop_kernels.clop_loss` does; the libraries' own names of arguments come first and are theirs.
"""

from . import clop, lightly, open_clip, pytorch_metric_learning, supcontrast

__all__ = ["clop", "lightly", "open_clip", "pytorch_metric_learning", "supcontrast"]
