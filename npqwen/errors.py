"""What can go wrong, by whose move mends it.  Every message is one line: the problem and the way out."""


class NpqwenError(Exception):
    """Base of every error this package raises on purpose."""


class CheckpointError(NpqwenError):
    """A Hugging Face checkpoint that cannot be used: foreign, incomplete or damaged."""


class FormatError(NpqwenError):
    """A converted model that cannot be read: truncated, altered or of a newer format."""


class ModelNotFoundError(NpqwenError):
    """MODEL names no directory here and no repository on the hub."""


class OptionError(NpqwenError, ValueError):
    """An option outside its range, or two that exclude each other."""


class OutputError(NpqwenError):
    """The place to write to exists already, is not writable, or is full."""


class ContextLengthError(NpqwenError, ValueError):
    """More tokens than the model's context, or than the room asked for, can hold."""


class ClosedError(NpqwenError):
    """The model was closed and can compute no more."""


class OutOfMemoryError(NpqwenError, MemoryError):
    """The machine has too little memory left for what was asked; said before it starts to swap."""


class SamplingWarning(UserWarning):
    """Sampling options that the model's authors advise against."""
