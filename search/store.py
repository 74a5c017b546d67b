"""A place that all nodes of a search reach: a folder, or object storage such as s3://BUCKET/PATH, through fsspec."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.codec import digest
from ..core.errors import AutocompressError, InputError, MissingDependencyError

OBJECTS = {"s3", "gs", "gcs", "abfs", "az"}


class StoreError(AutocompressError, OSError):
    """The shared place can't be reached, or refuses."""


@contextmanager
def _as_store_error() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # each kind of storage has errors of its own
        raise StoreError((str(error).splitlines() or [type(error).__name__])[0]) from error


@dataclass(frozen=True)
class Store:
    """Files by name below a URL; its methods raise StoreError.

    Attributes:
        url: of a folder; what stands in it was made from the same model and data.
    """

    url: str

    def names(self, start: str) -> list[str]:
        """Names of the files that begin with `start`."""
        files, root = self._files()
        folder, _, _ = start.rpartition("/")
        with _as_store_error():
            files.invalidate_cache()  # others write meanwhile
            if not files.isdir(f"{root}/{folder}"):
                return []
            found = [str(path).removeprefix(f"{root}/") for path in files.find(f"{root}/{folder}")]
        return sorted(name for name in found if name.startswith(start) and not name.endswith(".part"))

    def get(self, name: str, path: Path) -> bool:
        """Fetch a file, at once or not at all; False where it is gone."""
        files, root = self._files()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            with _as_store_error():
                files.get_file(f"{root}/{name}", str(part))
        except StoreError as error:
            part.unlink(missing_ok=True)
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        part.replace(path)
        return True

    def put(self, path: Path, name: str) -> None:
        """Store a file; who reads meanwhile sees the old one or the new one."""
        files, root = self._files()
        to = f"{root}/{name}"
        with _as_store_error():
            _make_folder(files, to.rpartition("/")[0])
            if "file" in _protocols(files):
                part = f"{to}.{uuid.uuid4().hex}.part"
                files.put_file(str(path), part)
                os.replace(part, to)
            else:
                files.put_file(str(path), to)  # objects appear whole

    def drop(self, name: str) -> None:
        """Delete a file, if it is there."""
        files, root = self._files()
        with _as_store_error(), suppress(FileNotFoundError):
            files.rm_file(f"{root}/{name}")

    def _files(self) -> tuple[Any, str]:
        import fsspec

        files, root = fsspec.core.url_to_fs(self.url)
        return files, root.rstrip("/")


def _protocols(files: Any) -> set[str]:
    return {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)


def _make_folder(files: Any, path: str) -> None:
    """Make a folder where there is such a thing; object storage would make a bucket instead, of a mistyped name."""
    if not _protocols(files) & OBJECTS:
        files.makedirs(path, exist_ok=True)


def open_store(url: str, made_from: Mapping[str, str]) -> Store:
    """The store below `url` for what is made from one model and data; tried by writing to it.

    Args:
        made_from: hashes of model and data, see `transfer.fingerprint`.

    Raises:
        InputError: it can't be written to.
        MissingDependencyError: the package for this kind of URL is not here.
    """
    if "://" not in url:
        url = str(Path(url).expanduser().resolve())
    store = Store(f"{url.rstrip('/')}/{digest(made_from)}")
    probe = f"probe-{uuid.uuid4().hex}"
    try:
        with _as_store_error():
            files, root = store._files()
            _make_folder(files, root)
            files.pipe_file(f"{root}/{probe}", b"autocompress")
        store.drop(probe)
    except ImportError as error:
        scheme = url.partition("://")[0]
        hint = "pip install 'autocompress[s3]'" if scheme == "s3" else "pip install the package that fsspec names"
        raise MissingDependencyError(f"shared: {str(error).splitlines()[0]} ({hint})") from error
    except StoreError as error:
        raise InputError(f"shared: can't write to {url}: {error}") from error
    return store
