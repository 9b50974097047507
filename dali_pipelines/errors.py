"""What can go wrong with images: the user's data, the storage it lies on, one image."""

from __future__ import annotations


class DataError(ValueError):
    """The user's data or its configuration is wrong; the message says what was given and what to do."""


class StorageError(DataError):
    """Files cannot be read for a reason that has nothing to do with an image: the run stops, nothing is quarantined."""


class BrokenImage(Exception):
    """An image that cannot be used, and why. `lasting`: it will be broken tomorrow as well; a lost file may be back."""

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting
