"""The one base of refusals."""


class RamrecError(ValueError):
    """Something the caller can mend (a file, a config, a run); the message is one clear line."""
