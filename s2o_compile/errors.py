"""Every error and warning this project raises on purpose."""

from s2o_compile.kernels.support.errors import DenseGradientWarning as DenseGradientWarning
from s2o_compile.kernels.support.errors import ImplementationUnavailableError as ImplementationUnavailableError
from s2o_compile.kernels.support.errors import InputError as InputError
from s2o_compile.kernels.support.errors import RankError as RankError
from s2o_compile.kernels.support.errors import S2OError as S2OError
from s2o_compile.kernels.support.errors import TunedFileWarning as TunedFileWarning
from s2o_compile.kernels.support.torch_compat import MissingTorchNameError as MissingTorchNameError
from s2o_compile.passes.dump import DumpError as DumpError


class OptionError(S2OError, ValueError):
    """An option or a configuration field that does not exist, or a value it cannot take."""


class EvaluationError(S2OError, ValueError):
    """A model that cannot be evaluated, or batches so short that no attention runs sparse."""


class DenseExportWarning(UserWarning):
    """A graph leaves torch for a format that has no operator for S2O, with dense attention in its place."""


class TensorRTUnavailableError(S2OError, ImportError):
    """torch-tensorrt, or a library that it needs, cannot be imported here."""


class ExportError(S2OError, ValueError):
    """A model that torch.export cannot make a program of, for a reason that can be said in a line."""


class PackageError(S2OError, ValueError):
    """A program that cannot become a package, or a path that cannot hold one."""


class LoadingError(S2OError, RuntimeError):
    """A folder, a file or a hub name that holds no usable model."""


class UnusedWeightsWarning(UserWarning):
    """A weights file holds weights that the configuration's model does not have."""


class WholeLogitsWarning(UserWarning):
    """The logits of all tokens are held at once, because the model gives no others."""


class NothingRewrittenWarning(UserWarning):
    """A captured graph holds attention, and none could be rewritten; or no attention of a long call ran sparse."""


class UnknownSiteWarning(UserWarning):
    """The configuration names a site, and no attention of a captured graph has that name."""


class AttentionImplementationWarning(UserWarning):
    """A transformers model is configured for S2O, and has another attention implementation."""


class UntestedTorchWarning(UserWarning):
    """This torch is outside the range that s2o_compile was tested with."""
