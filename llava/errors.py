"""Errors that a user can cause and mend.

Every message is one sentence or two: what is wrong (naming the file, key or value) and the way out.
The command line prints the message without a traceback and exits with status 2.
"""


class UserError(ValueError):
    """Base of all errors caused by input: a file, a configuration, a checkpoint, a device."""


class ConfigError(UserError):
    """An unknown key, a wrong type, or an impossible value in a configuration."""


class VideoError(UserError):
    """A video that is missing, corrupt, empty, or that no installed decoder opens."""


class ImageError(UserError):
    """An image that is missing, corrupt or empty."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or whose weights have the wrong shape."""


class DeviceError(UserError):
    """A device, dtype or attention kernel that this machine does not offer."""


class VersionError(UserError, ImportError):
    """A Python, torch or transformers that is not installed in a version that this package supports."""
