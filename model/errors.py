"""The base of all errors that the user can correct."""


class RamrecError(ValueError):
    """Something that the caller can correct, such as a file or a config; the message is one line."""
