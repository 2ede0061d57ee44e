"""File systems of fsspec for URLs: which package a protocol needs, and answers of web servers that are bounded."""

from __future__ import annotations

import functools
import re
from typing import Any

from asit.errors import ConfigError, StoreError

MOST = 512 << 20
"""Bytes of a remote file that is read at once, such as an index: two million clips and more."""
_LISTING = 32 << 20
"""Bytes of a web server's page that lists a folder."""
_PACKAGES = {
    **{"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"},
    **{"az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko"},
}
WEB = frozenset({"http", "https"})
ATOMIC = frozenset({"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "hf"})
"""Protocols of stores in which a file appears only when all of it has come."""


class RefusalError(StoreError):
    """An error that a retry does not mend."""


class MissingError(RefusalError):
    """There is no such file."""


def protocol_of(url: str) -> str:
    """Return the protocol of a URL, such as "s3"."""
    return url.split("://", 1)[0].lower()


def file_system(url: str) -> tuple[Any, str]:
    """Return this process's file system for a URL, and the path in it.

    Raises:
        ConfigError: no such protocol, or its package is not installed.
    """
    import fsspec  # type: ignore[import-untyped]

    protocol = protocol_of(url)
    try:
        files, path = fsspec.core.url_to_fs(url, **(_web_options(protocol) if protocol in WEB else {}))
    except (ImportError, ValueError) as error:
        needed = _PACKAGES.get(protocol)
        if needed is None:
            raise ConfigError(
                f"{url}: {protocol}:// is no kind of store that fsspec knows here ({error})",
                "such as https://, s3:// or gs://",
                "correct the URL, or install the package of fsspec for it",
            ) from None
        how = "'asit-audio[remote]'" if needed == "aiohttp" else needed
        raise ConfigError(
            f"{url} needs {needed}, which is not installed", "the package that reads it", f"pip install {how}"
        ) from None
    return files, path


def timeout(files: Any, seconds: float) -> dict[str, float]:
    """Return the argument that bounds an answer's time, where the file system takes one."""
    return {"timeout": seconds} if getattr(files, "async_impl", False) else {}


def too_long(location: str, length: int | None, most: int) -> RefusalError:
    """Return the error about a remote file or an answer that exceeds a limit; `length` None: unknown."""
    found = "sends more bytes than that" if length is None else f"has {length:,} bytes"
    return RefusalError(
        f"{location} {found}",
        f"{most:,} bytes at most, to be read at once",
        "check the address; copy a larger index to a disk and read it there",
    )


@functools.cache
def _web_options(protocol: str) -> dict[str, Any]:
    """Return arguments of fsspec's file system for the web, under which no answer exceeds its limit."""
    import aiohttp
    import fsspec

    class BoundedResponse(aiohttp.ClientResponse):
        """An answer that is read until it is longer than allowed; fsspec would take whatever a server sends."""

        async def read(self) -> bytes:
            range_ = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            if range_ is None and (self.content_length or 0) > MOST:
                self.close()
                raise too_long(str(self.url), self.content_length, MOST)
            return await self._read(int(range_[2]) - int(range_[1]) + 1 if range_ else MOST)

        async def text(self, *args: Any, **options: Any) -> str:
            if len(await self._read(_LISTING)) > _LISTING:
                raise too_long(str(self.url), None, _LISTING)
            return await super().text(*args, **options)

        async def _read(self, most: int) -> bytes:
            if self._body is None:
                parts, length = [], 0
                async for part in self.content.iter_chunked(1 << 20):
                    parts.append(part)
                    length += len(part)
                    if length > most:
                        self.close()
                        break
                self._body = b"".join(parts)
            return self._body

    own = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    return {"client_kwargs": {**own, "response_class": BoundedResponse}}
