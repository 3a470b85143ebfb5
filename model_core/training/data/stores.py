"""Where the pictures of a data set lie, and nowhere else: below one folder, or inside one zip.

In: the names that records give; out: encoded bytes. A name that leads out of the folder, by `..`, as an absolute path
or through a link, is refused before anything is opened; so is what is no ordinary file. Nothing is written.
"""

from __future__ import annotations

import os
import posixpath
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from model_core.errors import ImageNotFoundError, ImageTooLargeError, RecordError
from model_core.processing.sources import SHRINK, LazyImage
from model_core.training.data.archive import Archive


class Store(ABC):
    """A closed place with pictures in it."""

    @abstractmethod
    def read(self, name: str, max_bytes: int) -> bytes:
        """The file of this name. Raises ImageError; RecordError where the name leads out of the place."""

    def shown(self, name: str) -> str:
        """The name as `format_conversations` gets it."""
        return name


@dataclass(frozen=True, slots=True)
class StoredImage(LazyImage):
    """A picture in a store, not read yet."""

    store: Store
    name: str

    def read(self, max_bytes: int) -> bytes:
        return self.store.read(self.name, max_bytes)


class FolderStore(Store):
    """Files below a folder. Links inside it may only lead to places inside it; the folder itself may be a link."""

    def __init__(self, root: Path) -> None:
        # A string: Path takes longer to resolve a name than the system to open it.
        self._root = os.path.realpath(root)

    def shown(self, name: str) -> str:
        return str(Path(self._root) / name)

    def read(self, name: str, max_bytes: int) -> bytes:
        try:
            found = os.path.realpath(os.path.join(self._root, name))
            if os.path.commonpath((self._root, found)) != self._root:
                raise _outside(name)
            # Without O_NONBLOCK a pipe that nobody writes to would be waited on for ever.
            handle = os.open(found, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(handle, "rb") as file:
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    raise ImageNotFoundError(
                        "this path is not a file", value=name, allowed="an ordinary file",
                        fix="Name the picture's file itself",
                    )  # fmt: skip
                if status.st_size > max_bytes:
                    raise _too_large(name, max_bytes)
                return file.read(max_bytes)
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name; a circle of links
            raise ImageNotFoundError(
                "the image file can't be read", value=name,
                allowed="a file below image_root, or without one below the data file's folder",
                fix="Check the path, or set image_root",
            ) from error  # fmt: skip


class ZipStore(Store):
    """Members of a zip, named from a folder within it or from its top."""

    def __init__(self, archive: Archive, folder: str) -> None:
        self.archive, self.folder = archive, folder

    def read(self, name: str, max_bytes: int) -> bytes:
        candidates = list(dict.fromkeys(posixpath.normpath(posixpath.join(at, name)) for at in (self.folder, "")))
        if name.startswith("/") or all(one.startswith("..") for one in candidates):
            raise _outside(name)
        member = next((one for one in candidates if one in self.archive), None)
        if member is None:
            raise ImageNotFoundError("the zip holds no such file", value=name, fix="Check the path and its case")
        data = self.archive.read(member, max_bytes)
        if data is None:
            raise _too_large(name, max_bytes)
        return data


def _outside(name: str) -> RecordError:
    return RecordError(
        "outside_root", "the image's path leads out of the folder that images may come from", value=name,
        allowed="paths below image_root, or without one below the data file's folder",
        fix="Set image_root to a folder that holds all images, links resolved",
    )  # fmt: skip


def _too_large(name: str, max_bytes: int) -> ImageTooLargeError:
    return ImageTooLargeError("the file is too large", value=name, allowed=f"{max_bytes} bytes", fix=SHRINK)
