"""The errors that a user can meet. Each message gives the value, the limit and the next step, in one or two lines."""


class EdgerunError(Exception):
    """Anything that edgerun refuses or that went wrong; `edgerun` prints it without a traceback and exits with 2."""


class CheckpointError(EdgerunError):
    """The checkpoint folder is missing something, is damaged, or holds a model that edgerun cannot export."""


class ExportError(EdgerunError):
    """The recipe cannot be served for this model, or a stage of the export failed."""


class BundleError(EdgerunError):
    """A bundle is damaged, of a schema that this version does not read, or lacks what was asked of it."""


class ParityError(EdgerunError):
    """What a bundle computes differs from its model by more than the tolerance table allows."""


class DeviceError(EdgerunError):
    """A device cannot be reached, lacks what a bundle needs, or a run on it failed."""
