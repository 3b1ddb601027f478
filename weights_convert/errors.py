"""The one error this package raises for a file it will not take."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message is one line: the file, the key, what was expected, what was found."""
