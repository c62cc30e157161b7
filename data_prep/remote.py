"""Shards behind a URL: each file is fetched whole into a cache on this machine, and checked before it gets its name.

A URL is http(s):// or any other that fsspec has a file system for (s3://, gs://, memory://; some need a package of
their own, which the error names). Credentials come from where that file system looks for them (environment,
~/.netrc, the cloud's own files) or from the URL; they are in no message and in no name of a file.

Own code beside fsspec: its caches have no bound, no hash and no lock between processes, and no stall ends. Own waits,
as tenacity's draw from the program's random numbers.

    CACHE/SHA-256 of the set/shard-000000.tar    the last use of a shard is its time of modification
    CACHE/manifests/SHA-256 of the URL           for when the server cannot be reached
    CACHE/.fetching/                             what is under way, and locks
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import os
import random
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard, TypeVar
from urllib.parse import unquote

import fsspec
from filelock import FileLock
from fsspec.callbacks import Callback

from ldgan.engine.cli import UserError
from ldgan.engine.files import sha256_of_file, writing_to

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0  # before the second attempt; doubled before each one after it
LONGEST_WAIT_SECONDS = 30.0
STALL_SECONDS = 60.0  # a transfer is given up that in this time, after it or within it, brings fewer bytes than
MIN_BYTES_PER_SECOND = 1024.0
DEFAULT_CACHE_GB = 100.0
LEFTOVER_SECONDS = 24 * 3600.0  # what a killed process was fetching is removed after this time

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_HTTP_TIMEOUT, _HTTP_TOO_EARLY, _HTTP_TOO_MANY_REQUESTS = 408, 425, 429

T = TypeVar("T")


def is_url(path: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether ``path`` is a URL, not a folder of this machine; raises `UserError` for URLs that are commands or chains.

    A ``Path`` never is one: it makes "http:/x" of "http://x", so URLs have to be kept as str.
    """
    if not isinstance(path, str):
        return False
    if path.startswith("pipe:"):
        raise UserError(
            "pipe: would run a command, and data never does; give a folder or the URL of one: http(s)://, s3://, gs://"
            " and whatever else fsspec reads, with credentials from the environment"
        )
    if "::" in path and "://" in path:
        raise UserError("chains of URLs (::) are not read; give the URL of a folder of shards")
    return _SCHEME.match(path) is not None


def public_url(url: str) -> str:
    """The URL without user, password, query and fragment; raises `UserError` where it is unclear what is a password."""
    scheme, separator, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    path = re.split(r"[?#]", rest[len(authority) :], maxsplit=1)[0]
    if "@" in rest[len(authority) :] and ":" in authority and "@" not in authority:
        raise UserError(f"a {scheme}:// URL has a colon, then an unescaped @; write / ? # in a password, and @, as %XX")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{path}"


class RemoteFile(NamedTuple):
    """A file that should be in a remote folder: its name, size, and SHA-256 (hex)."""

    name: str
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder of fetched files, of at most ``max_bytes``; any number of processes of a machine may share it.

    Shards used longest ago make room for new ones, of whatever set. One that is open in a process of this machine
    stays: it would keep its place on the disk anyway until it is closed. So the size can exceed the limit if more
    than that is open at a time, and for as long as several processes fetch at once.
    """

    folder: Path
    max_bytes: int

    @classmethod
    def from_environment(cls) -> Cache:
        """The cache of ``LDGAN_CACHE`` (default ~/.cache/ldgan) and ``LDGAN_CACHE_GB`` (1e9 bytes each; 100)."""
        folder = os.environ.get("LDGAN_CACHE") or Path.home() / ".cache" / "ldgan"
        text = os.environ.get("LDGAN_CACHE_GB") or str(DEFAULT_CACHE_GB)
        try:
            max_bytes = int(float(text) * 1e9)
        except (OverflowError, ValueError):
            max_bytes = 0
        if max_bytes <= 0:
            raise UserError(f"LDGAN_CACHE_GB={text} is no size; set the number of gigabytes that the cache may take")
        return cls(Path(folder), max_bytes)

    def path(self, set_fingerprint: str, name: str) -> Path:
        """Where a shard of a set lies once it is fetched."""
        return self.folder / set_fingerprint / name

    def manifest_path(self, url: str) -> Path:
        """Where the manifest is kept that ``url``, without credentials, last gave."""
        return self.folder / "manifests" / hashlib.sha256(url.encode()).hexdigest()

    @contextlib.contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """A new folder on the cache's file system, removed at the end."""
        parent = self._fetching_folder()
        with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def lock(self, set_fingerprint: str, name: str) -> Iterator[None]:
        """Let one process at a time fetch a shard; the others wait. A process that dies lets go."""
        path = self._fetching_folder() / f"{set_fingerprint}-{name}.lock"
        with FileLock(path):  # sees when the file that it holds has been removed, and begins again
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def make_room(self, num_bytes: int) -> None:
        """Remove what was used longest ago until ``num_bytes`` more fit, or nothing is left that may go."""
        shards = sorted(self._shards(), key=lambda shard: shard.used)
        excess = sum(shard.num_bytes for shard in shards) + self._fetching_bytes() + num_bytes - self.max_bytes
        for shard in shards:
            if excess <= 0:
                return
            if _remove_unless_open(shard.path):
                excess -= shard.num_bytes

    def _shards(self) -> Iterator[_CachedShard]:
        for path in self.folder.glob("[0-9a-f]*/shard-*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                status = path.stat()
                yield _CachedShard(path, status.st_mtime, status.st_size)

    def _fetching_bytes(self) -> int:
        """What lies in the folder of fetches, once those are removed that no living process can be at."""
        num_bytes = 0
        for folder in self._fetching_folder().iterdir():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                files = [path.stat() for path in folder.iterdir()]
                newest = max([folder.stat().st_mtime, *(file.st_mtime for file in files)])
                if newest < time.time() - LEFTOVER_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    num_bytes += sum(file.st_size for file in files)
        return num_bytes

    def _fetching_folder(self) -> Path:
        folder = self.folder / ".fetching"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class _CachedShard(NamedTuple):
    path: Path
    used: float  # seconds since the epoch
    num_bytes: int


class RemoteFolder:
    """A folder behind a URL, whose files are read through a cache. ``str()`` of it, for messages, is `public_url`.

    What fails is tried again, `ATTEMPTS` times in all with growing random waits, unless trying again cannot help (no
    such file, no permission). A file whose size or SHA-256 is wrong is a failed attempt too. Holds no connection, so
    that it can be pickled and shared with forked processes.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self.name = public_url(url).rstrip("/")
        self.cache = cache
        self._url = url

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"RemoteFolder({self.name!r})"  # without credentials

    def read(self, name: str, max_bytes: int, parse: Callable[[bytes], T]) -> T:
        """Fetch a file of at most ``max_bytes`` and return what ``parse`` makes of its content.

        If the server cannot be reached, the content that it gave last is taken, with a warning. What ``parse``
        raises is passed on.

        Raises:
            UserError: neither the server nor the cache has it.
        """
        kept = self.cache.manifest_path(f"{self.name}/{name}")
        with writing_to(self.cache.folder), self.cache.temporary_folder() as temporary:
            try:
                path = self._fetch(name, temporary, max_bytes)
            except _UnreachableError as error:
                return self._read_kept(kept, parse, error)
            result = parse(path.read_bytes())
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept)
            return result

    def _read_kept(self, kept: Path, parse: Callable[[bytes], T], error: _UnreachableError) -> T:
        try:
            result = parse(kept.read_bytes())
        except FileNotFoundError:
            raise UserError(str(error)) from None
        warnings.warn(f"{error}; meanwhile the copy of its last answer is used", stacklevel=3)
        return result

    def open(self, file: RemoteFile, set_fingerprint: str) -> BinaryIO:
        """Open a shard of the set with this fingerprint, fetched now if it is not in the cache.

        Raises:
            UserError: it cannot be fetched, or has another size or SHA-256 than it should; or the cache is full.
        """
        with writing_to(self.cache.folder):
            path = self.cache.path(set_fingerprint, file.name)
            opened = _open_cached(path, file.num_bytes)
            if opened is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.lock(set_fingerprint, file.name):
                    # Another process may have fetched it while this one waited.
                    opened = _open_cached(path, file.num_bytes) or self._fetch_shard(file, path)
            return opened

    def _fetch_shard(self, file: RemoteFile, path: Path) -> BinaryIO:
        if file.num_bytes > self.cache.max_bytes:
            raise UserError(
                f"{self.name}/{file.name} has {file.num_bytes / 1e9:,.3f} GB, more than the cache may take; set "
                f"LDGAN_CACHE_GB (now {self.cache.max_bytes / 1e9:g})"
            )
        self.cache.make_room(file.num_bytes)
        with self.cache.temporary_folder() as temporary:
            try:
                fetched = self._fetch(file.name, temporary, file.num_bytes, file.sha256)
            except _UnreachableError as error:
                raise UserError(str(error)) from None
            opened = _open_cached(fetched, file.num_bytes)  # before another process can see, and remove it
            assert opened is not None
            os.fsync(opened.fileno())
            os.replace(fetched, path)
        return opened

    def _fetch(self, name: str, folder: Path, max_bytes: int, sha256: str | None = None) -> Path:
        """Fetch a file into ``folder``, with all attempts; with ``sha256`` it has exactly ``max_bytes``.

        Raises `UserError` where trying again cannot help, `_UnreachableError` after the last attempt, and OSError for
        a full disk.
        """
        reason = ""
        for attempt in range(1, ATTEMPTS + 1):
            # An attempt that was given up may still write: to a file that nobody else uses.
            path = folder / f"{attempt}-{name}"
            try:
                _download(self._url_of(name), path, max_bytes)
                if sha256 is not None:
                    _check(path, max_bytes, sha256)
                return path
            except UserError:
                raise
            except Exception as error:  # each file system has errors of its own
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    raise
                reason = self._without_credentials(error)
                if _is_final(error):
                    raise UserError(f"{self.name}/{name} cannot be fetched ({reason}); check the URL") from None
                path.unlink(missing_ok=True)
            if attempt < ATTEMPTS:
                time.sleep(_wait_seconds(attempt))
        raise _UnreachableError(
            f"{self.name}/{name} could not be fetched in {ATTEMPTS} attempts (at last: {reason}); check the server "
            "and the network, then run the same command"
        )

    def _url_of(self, name: str) -> str:
        base, question_mark, query = self._url.partition("?")
        return f"{base.rstrip('/')}/{name}{question_mark}{query}"

    def _without_credentials(self, error: Exception) -> str:
        """What went wrong, on one line, without the URL and its secrets, which errors like to repeat."""
        authority, _, rest = self._url.partition("://")[2].partition("/")
        secrets = [*authority.rpartition("@")[0].split(":"), rest.partition("?")[2]]
        text = re.sub(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"]*", "URL", " ".join(str(error).split()))
        for secret in {*secrets, *map(unquote, secrets)} - {""}:
            text = text.replace(secret, "***")
        return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _UnreachableError(Exception):
    """All attempts have failed; the message is that of a `UserError`."""


def _download(url: str, path: Path, max_bytes: int) -> None:
    """Fetch a file, in a thread that can be left behind: not every file system has a timeout of its own."""
    filesystem, remote_path = _filesystem(url)
    given_up = threading.Event()

    def check(size: int | None, value: int) -> None:
        if given_up.is_set():
            raise TimeoutError("given up")
        if value > max_bytes:
            raise ValueError(f"more than {max_bytes:,} bytes")

    def get() -> None:
        filesystem.get_file(remote_path, str(path), callback=Callback(hooks={"check": check}))

    transfer = _in_thread(get)
    num_bytes = 0
    while not concurrent.futures.wait([transfer], STALL_SECONDS).done:
        before, num_bytes = num_bytes, path.stat().st_size if path.exists() else 0
        if num_bytes - before < MIN_BYTES_PER_SECOND * STALL_SECONDS:
            given_up.set()
            raise TimeoutError(f"stalled after {num_bytes:,} bytes, {STALL_SECONDS:g} seconds without enough of them")
    transfer.result()
    if (size := path.stat().st_size) > max_bytes:  # of a file system that does not report progress
        raise ValueError(f"{size:,} bytes, more than {max_bytes:,}")


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; raises `UserError` where there is none."""
    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, **(_http_options() if scheme in ("http", "https") else {}))
    except ImportError as error:
        raise UserError(f"{scheme}:// cannot be read: {error}") from None
    except ValueError:
        raise UserError(f"{scheme}:// is no kind of URL that fsspec knows; give a folder or another URL") from None


def _http_options() -> dict[str, Any]:
    import aiohttp  # an optional dependency of fsspec, as is s3fs for s3://

    # By default a transfer may take five minutes in all, too short for a large shard on a slow line.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # trust_env: proxies, ~/.netrc


def _in_thread(function: Callable[[], None]) -> concurrent.futures.Future[None]:
    """Run ``function`` in a thread that, unlike an executor's, does not keep the process from ending."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        try:
            function()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    return future


def _check(path: Path, num_bytes: int, sha256: str) -> None:
    """Raise ValueError where a file is not what it should be."""
    if (size := path.stat().st_size) != num_bytes:
        raise ValueError(f"{size:,} bytes instead of {num_bytes:,}")
    if sha256_of_file(path) != sha256:
        raise ValueError("its SHA-256 is not the one in the manifest")


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    status = getattr(error, "status", None)  # of an HTTP answer
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (_HTTP_TIMEOUT, _HTTP_TOO_EARLY, _HTTP_TOO_MANY_REQUESTS)
    return isinstance(error, FileNotFoundError | PermissionError | NotImplementedError)


def _wait_seconds(attempt: int) -> float:
    """How long to wait after failed attempt 1, 2, ...: doubling, up to half of it less by chance.

    Processes that failed together so do not come back together. The chance is the system's, as the program's own
    random numbers must not depend on a network.
    """
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
    return random.SystemRandom().uniform(longest / 2, longest)


def _open_cached(path: Path, num_bytes: int) -> BinaryIO | None:
    """Open a cached file and mark it as used and in use; None if it is not there, or is cut, which removes it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != num_bytes:
        file.close()
        path.unlink(missing_ok=True)
        return None
    # Without them (a cache of another user, a file system without locks) the shard may only go earlier than it should.
    with contextlib.suppress(OSError):
        os.utime(path)
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def _remove_unless_open(path: Path) -> bool:
    """Remove a file that no process holds by `_open_cached`; whether it was removed."""
    try:
        with path.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True  # by another process
    except OSError:
        return False
    return True
