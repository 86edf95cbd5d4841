"""The losses of other libraries, with the constructors, calls and conventions of those libraries and the kernels of this package.

There is one module for each library, with the library's name, so that a training script changes one import line::

    from lightly.loss import NTXentLoss                   ->  from clop_kernels.compat.lightly import NTXentLoss
    from losses import SupConLoss  (SupContrast)          ->  from clop_kernels.compat.supcontrast import SupConLoss
    from pytorch_metric_learning.losses import SupConLoss ->  from clop_kernels.compat.pytorch_metric_learning import SupConLoss
    from open_clip import ClipLoss                        ->  from clop_kernels.compat.open_clip import ClipLoss
    from losses import CLOPLoss  (the paper's code)       ->  from clop_kernels.compat.clop import CLOPLoss

Each class gives the same values and gradients as the library, up to rounding, and does not need the library. An option that would
need an N x N array raises NotImplementedError; the message names the option and a remedy. The arguments have the library's names
and order. Every class also takes ``backend=``, as :func:`clop_kernels.clop_loss` does.
"""

from . import clop, lightly, open_clip, pytorch_metric_learning, supcontrast

__all__ = ["clop", "lightly", "open_clip", "pytorch_metric_learning", "supcontrast"]
