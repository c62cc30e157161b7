from __future__ import annotations

import contextlib
import http.server
import multiprocessing
import os
import pickle
import re
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep import remote, shards
from data_prep.remote import Cache, RemoteFolder, is_url, public_url
from data_prep.shards import Manifest, ShardSet, ShardWriter
from ldgan.engine.cli import UserError

SHARD = "shard-000000.tar"


def content(index: int) -> dict[str, bytes]:
    return {"png": bytes([index]) * 3000, "cls": str(index).encode()}


def write(out: Path, num_samples: int = 6, first: int = 0) -> Manifest:
    """Write shards of two samples; ``first`` makes sets that differ."""
    with ShardWriter(out, "images", samples_per_shard=2) as writer:
        for index in range(num_samples):
            writer.write(content(first + index))
    return writer.manifest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and waits that nobody notices."""
    monkeypatch.setenv("LDGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LDGAN_CACHE_GB", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    return tmp_path / "cache"


def cached_shards(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/shard-*.tar"))


def leftovers(cache: Path) -> list[Path]:
    return list((cache / ".fetching").iterdir())


# --- A server that misbehaves -------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; ``faults[name]`` answers the next requests for that file, one each, in place of its content."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, list[Callable[[Handler, bytes], None]]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.queries: set[str] = set()
        self.authorizations: set[str] = set()
        self.released = threading.Event()  # ends all stalls
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = path.rpartition("/")[2]
        self.server.requests[name] += 1
        self.server.queries.add(query)
        self.server.authorizations.add(self.headers.get("Authorization", ""))
        file = self.server.folder / name
        if not file.exists():
            return self.send_error(404)
        if self.server.faults[name]:
            return self.server.faults[name].pop(0)(self, file.read_bytes())
        return self.answer(file.read_bytes())

    def answer(self, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def status(code: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, body: handler.send_error(code)


def cut(handler: Handler, body: bytes) -> None:
    handler.answer(body[: len(body) // 2], length=len(body))
    handler.close_connection = True


def short(handler: Handler, body: bytes) -> None:
    handler.answer(body[:-512])


def long(handler: Handler, body: bytes) -> None:
    handler.answer(body + b"x")


def wrong(handler: Handler, body: bytes) -> None:
    handler.answer(body[:-1] + b"x")


def stall(handler: Handler, body: bytes) -> None:
    handler.answer(body[: len(body) // 2], length=len(body))
    handler.server.released.wait()


def drip(handler: Handler, body: bytes) -> None:
    """Send a byte now and then, which no timeout between two bytes would notice."""
    handler.answer(b"", length=len(body))
    for number in body:
        if handler.server.released.wait(0.02):
            return
        with contextlib.suppress(OSError):
            handler.wfile.write(bytes([number]))


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http://")
    write(tmp_path / "set")
    with Server(tmp_path / "set") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


# --- Reading ------------------------------------------------------------------------------------------------


def test_a_set_behind_http_reads_as_the_folder_does_and_each_shard_is_fetched_once(server, cache):
    samples, local = ShardSet.open(server.url), ShardSet.open(server.folder)
    assert samples.manifest == local.manifest
    assert server.requests == {"manifest.json": 1}  # shards only when they are needed
    for index in (5, 0, 1, 4):
        assert samples.read(index) == local.read(index)
    assert ShardSet.open(server.url).read(0) == local.read(0)
    assert server.requests == {"manifest.json": 2, SHARD: 1, "shard-000002.tar": 1}
    assert cached_shards(cache) == [SHARD, "shard-000002.tar"]
    assert leftovers(cache) == []


def test_any_file_system_of_fsspec_will_do(tmp_path):
    write(tmp_path / "set")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set"), "/bucket/set", recursive=True)
    try:
        samples = ShardSet.open("memory://bucket/set/")
        assert [samples.read(index) for index in range(6)] == [content(index) for index in range(6)]
        assert samples.locate(3) == "memory://bucket/set/shard-000001.tar, sample 000000003"
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_file_url_gives_a_cached_copy(tmp_path, cache):
    write(tmp_path / "set")
    assert ShardSet.open(f"file://{tmp_path}/set").read(2) == content(2)
    assert cached_shards(cache) == ["shard-000001.tar"]


def test_a_folder_is_read_in_place(tmp_path, cache):
    write(tmp_path / "set")
    assert ShardSet.open(str(tmp_path / "set")).read(2) == content(2)
    assert not cache.exists()


def test_workers_forked_after_the_first_request_read_on_their_own(server):
    samples = ShardSet.open(server.url)
    samples.read(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(samples.read, range(6), chunksize=1) == [content(index) for index in range(6)]


def test_a_pickled_set_reads_the_same(server):
    samples = ShardSet.open(server.url)
    samples.read(0)
    assert pickle.loads(pickle.dumps(samples)).read(5) == content(5)


def test_a_query_goes_along_with_every_request(server):
    assert ShardSet.open(f"{server.url}/sub/set/?signature=abc").read(0) == content(0)
    assert server.queries == {"signature=abc"}


# --- Servers that fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), cut, short, long, wrong])
def test_faults_that_pass_are_survived(server, cache, fault):
    server.faults[SHARD] = [fault] * (remote.ATTEMPTS - 1)
    assert ShardSet.open(server.url).read(0) == content(0)
    assert server.requests[SHARD] == remote.ATTEMPTS
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (status(503), "503"),
        (cut, "ClientPayloadError"),
        (short, r"\d,\d+ bytes instead of \d+,\d+"),
        (long, r"more than \d+,\d+ bytes"),
        (wrong, "its SHA-256 is not the one in the manifest"),
    ],
)
def test_faults_that_stay_end_in_one_line_that_names_shard_url_attempts_and_reason(server, cache, fault, reason):
    server.faults[SHARD] = [fault] * 99
    with pytest.raises(UserError) as caught:
        ShardSet.open(server.url).read(0)
    expected = (
        rf"{re.escape(server.url)}/{SHARD} could not be fetched in 6 attempts \(at last: .*{reason}.*\); check .*"
    )
    assert re.fullmatch(expected, str(caught.value))
    assert server.requests[SHARD] == remote.ATTEMPTS
    assert cached_shards(cache) == leftovers(cache) == []


@pytest.mark.parametrize("fault", [stall, drip])
def test_a_server_that_stalls_is_given_up_and_asked_again(server, cache, monkeypatch, fault):
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.2)
    server.faults[SHARD] = [fault, fault]
    assert ShardSet.open(server.url).read(0) == content(0)
    assert server.requests[SHARD] == 3
    server.faults["shard-000001.tar"] = [fault] * 99
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with pytest.raises(UserError, match=r"in 2 attempts \(at last: .*Timeout"):
        ShardSet.open(server.url).read(2)


def test_a_transfer_that_no_file_system_ends_is_left_behind(tmp_path, monkeypatch):
    class Stuck:
        def get_file(self, remote_path: str, local_path: str, callback: object) -> None:
            threading.Event().wait()

    monkeypatch.setattr(remote, "_filesystem", lambda url: (Stuck(), "x"))
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"in 6 attempts \(at last: TimeoutError: stalled after 0 bytes"):
        ShardSet.open("memory://stuck")


def test_a_transfer_that_hardly_moves_is_given_up(monkeypatch):
    class Slow:
        def get_file(self, remote_path: str, local_path: str, callback: object) -> None:
            with Path(local_path).open("wb", buffering=0) as file:
                for _ in range(200):
                    file.write(b"x")
                    time.sleep(0.005)

    monkeypatch.setattr(remote, "_filesystem", lambda url: (Slow(), "x"))
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with pytest.raises(UserError, match=r"in 2 attempts \(at last: TimeoutError: stalled after [1-9]"):
        ShardSet.open("memory://slow")


def test_what_trying_again_cannot_mend_fails_at_once(server):
    samples = ShardSet.open(server.url)
    (server.folder / SHARD).unlink()
    with pytest.raises(UserError, match=rf"/{SHARD} cannot be fetched \(FileNotFoundError.*check the URL"):
        samples.read(0)
    server.faults["shard-000001.tar"] = [status(403)]
    with pytest.raises(UserError, match=r"shard-000001.tar cannot be fetched \(ClientResponseError: 403"):
        samples.read(2)
    assert server.requests[SHARD] == server.requests["shard-000001.tar"] == 1


def test_waits_double_up_to_a_limit_and_differ(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 1.0)
    for attempt, longest in enumerate([1, 2, 4, 8, 16, 30, 30], 1):
        waits = {remote._wait_seconds(attempt) for _ in range(100)}
        assert len(waits) > 90
        assert longest / 2 <= min(waits) < 0.6 * longest
        assert 0.9 * longest < max(waits) <= longest


def test_a_manifest_without_end_is_refused(server, monkeypatch):
    monkeypatch.setattr(shards, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(UserError, match=r"manifest.json could not be fetched .*more than 100 bytes"):
        ShardSet.open(server.url)


def test_a_remote_manifest_is_checked_as_a_local_one(server):
    (server.folder / "manifest.json").write_text("<html>")
    with pytest.raises(UserError, match=rf"{server.url}/manifest.json is not a valid manifest"):
        ShardSet.open(server.url)


# --- Without a server ---------------------------------------------------------------------------------------


def unused_url() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_warm_cache_needs_no_server(server):
    samples = ShardSet.open(server.url)
    samples.read(0)
    server.faults["manifest.json"] = server.faults["shard-000001.tar"] = [status(502)] * 99
    with pytest.warns(UserWarning, match=r"manifest.json could not be fetched .*the copy of its last answer is used"):
        offline = ShardSet.open(server.url)
    assert offline.manifest == samples.manifest
    assert offline.read(1) == content(1)
    with pytest.raises(UserError, match=r"shard-000001.tar could not be fetched"):
        offline.read(2)


def test_a_server_that_never_answered_is_an_error():
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http://")
    with pytest.raises(UserError, match=r"manifest.json could not be fetched in 6 attempts \(at last: .*Connect"):
        ShardSet.open(unused_url())


# --- The cache ----------------------------------------------------------------------------------------------


def test_a_changed_set_never_mixes_with_the_old_one(server, tmp_path):
    old = ShardSet.open(server.url)
    assert old.read(0) == content(0)
    server.folder = tmp_path / "changed"
    write(server.folder, first=100)
    new = ShardSet.open(server.url)
    assert [new.read(index) for index in range(6)] == [content(100 + index) for index in range(6)]
    assert old.read(1) == content(1)
    with pytest.raises(UserError, match="SHA-256"):
        old.read(2)  # the server has only the new one


def test_shards_used_longest_ago_make_room(server, tmp_path, cache, monkeypatch):
    server.folder = tmp_path / "more"
    num_bytes = write(server.folder, num_samples=12).shards[0].num_bytes
    monkeypatch.setenv("LDGAN_CACHE_GB", str(4.5 * num_bytes / 1e9))
    for shard in (2, 0, 1, 3, 2):
        ShardSet.open(server.url).read(2 * shard)
        time.sleep(0.02)
    assert cached_shards(cache) == [f"shard-00000{number}.tar" for number in (0, 1, 2, 3)]
    ShardSet.open(server.url).read(2 * 4)
    assert cached_shards(cache) == [f"shard-00000{number}.tar" for number in (1, 2, 3, 4)]
    ShardSet.open(server.url).read(2 * 5)
    assert cached_shards(cache) == [f"shard-00000{number}.tar" for number in (2, 3, 4, 5)]
    assert server.requests["shard-000002.tar"] == 1


def test_open_shards_stay_though_the_limit_is_exceeded(server, cache, monkeypatch):
    monkeypatch.setenv("LDGAN_CACHE_GB", str(1.5 * ShardSet.open(server.folder).manifest.shards[0].num_bytes / 1e9))
    samples = ShardSet.open(server.url)
    for index in (0, 2):
        samples.read(index)
    assert cached_shards(cache) == [SHARD, "shard-000001.tar"]
    del samples
    ShardSet.open(server.url).read(4)
    assert cached_shards(cache) == ["shard-000002.tar"]


def test_a_lock_has_one_holder_though_its_file_is_removed_each_time(cache):
    num_holders, most_holders = 0, 0

    def hold() -> None:
        nonlocal num_holders, most_holders
        for _ in range(25):
            with Cache(cache, 1).lock("set", SHARD):
                num_holders += 1
                most_holders = max(most_holders, num_holders)
                time.sleep(0.001)
                num_holders -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most_holders == 1
    assert leftovers(cache) == []


def test_a_shard_that_vanished_or_was_cut_is_fetched_again(server, cache):
    ShardSet.open(server.url).read(0)
    (path,) = cache.glob(f"*/{SHARD}")
    path.unlink()
    assert ShardSet.open(server.url).read(0) == content(0)
    path.write_bytes(path.read_bytes()[:-1])
    assert ShardSet.open(server.url).read(0) == content(0)
    assert server.requests[SHARD] == 3


def test_what_a_killed_process_left_is_removed_in_the_end(server, cache):
    killed, running = cache / ".fetching" / "killed", cache / ".fetching" / "running"
    for folder in (killed, running):
        folder.mkdir(parents=True)
        (folder / "1-shard").write_bytes(b"x")
    long_ago = time.time() - remote.LEFTOVER_SECONDS - 1
    for path in (killed / "1-shard", killed, running):
        os.utime(path, (long_ago, long_ago))
    ShardSet.open(server.url).read(0)
    assert leftovers(cache) == [running]


def test_a_shard_larger_than_the_cache_is_refused_before_anything_has_to_go(server, cache, monkeypatch):
    ShardSet.open(server.url).read(0)
    monkeypatch.setenv("LDGAN_CACHE_GB", "0.000005")
    with pytest.raises(
        UserError, match=r"shard-000001.tar has 0.0\d\d GB, more than the cache may take; set LDGAN_CACHE"
    ):
        ShardSet.open(server.url).read(2)
    assert cached_shards(cache) == [SHARD]


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan", "inf"])
def test_a_cache_size_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("LDGAN_CACHE_GB", text)
    with pytest.raises(UserError, match=f"LDGAN_CACHE_GB={text} is no size"):
        Cache.from_environment()


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LDGAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=rf"{tmp_path}/file: cannot be written"):
        ShardSet.open(server.url)


def test_two_processes_that_need_a_shard_at_once_fetch_it_once(server):
    def slow(handler: Handler, body: bytes) -> None:
        time.sleep(0.3)
        handler.answer(body)

    server.faults[SHARD] = [slow] * 2
    samples = ShardSet.open(server.url)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.SimpleQueue()

    def read() -> None:
        barrier.wait()
        results.put(samples.read(0))

    processes = [context.Process(target=read) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get() for _ in processes] == [content(0)] * 2
    for process in processes:
        process.join()
    assert server.requests[SHARD] == 1


def test_a_process_killed_while_it_fetches_does_not_block_the_next(server, cache):
    server.faults[SHARD] = [stall]
    samples = ShardSet.open(server.url)
    process = multiprocessing.get_context("fork").Process(target=samples.read, args=(0,))
    process.start()
    while not server.requests[SHARD]:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert samples.read(0) == content(0)
    assert cached_shards(cache) == [SHARD]


# --- URLs ---------------------------------------------------------------------------------------------------


def test_credentials_stay_out_of_messages_and_of_the_cache(server, cache):
    url = server.url.replace("http://", "http://user:s3cr%2Ft@") + "/set?token=t0ken"
    samples = ShardSet.open(url)
    samples.read(0)
    assert any(text.startswith("Basic ") for text in server.authorizations)
    assert str(samples.folder) == f"{server.url}/set"
    server.faults["shard-000001.tar"] = [status(403)]
    server.faults["shard-000002.tar"] = [status(500)] * 99
    texts = [samples.locate(0), repr(samples.folder), str(list(cache.rglob("*")))]
    for index in (2, 4):
        with pytest.raises(UserError) as caught:
            samples.read(index)
        texts.append(str(caught.value))
    for text in texts:
        assert not re.search("user|s3cr|t0ken", text), text


def test_errors_that_repeat_a_secret_are_cleaned(cache):
    folder = RemoteFolder("s3://key:p%40ss@bucket/set?sig=q", Cache(cache, 1))
    error = OSError("cannot open s3://key:p%40ss@bucket/set?sig=q:\nlogin of key with p@ss (sig=q) failed")
    assert folder._without_credentials(error) == "OSError: cannot open URL login of *** with *** (***) failed"


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("http://host:80/a/b", "http://host:80/a/b"),
        ("https://user:pw@host/a@b?x=y@z#f", "https://host/a@b"),
        ("s3://bucket?versionId=1", "s3://bucket"),
        ("memory:///set", "memory:///set"),
    ],
)
def test_public_urls_hold_no_secrets(url, public):
    assert public_url(url) == public


def test_a_password_that_looks_like_a_path_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="as %XX") as caught:
        ShardSet.open("s3://key:se/cret@bucket/set")
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("command", ["pipe:touch {}", "pipe:cat {} |"])
def test_commands_are_refused(tmp_path, monkeypatch, command):
    """Whoever names them: a path to data, a manifest, or the environment."""
    command = command.format(tmp_path / "hacked")
    with pytest.raises(UserError, match=r"pipe: would run a command.*give a folder or the URL of one: http\(s\)://"):
        ShardSet.open(command)
    write(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDGAN_CACHE", command)  # a folder of that name
    assert ShardSet.open(f"file://{tmp_path}/set").read(0) == content(0)
    path = tmp_path / "set" / "manifest.json"
    path.write_text(path.read_text().replace(SHARD, command))
    for folder in (tmp_path / "set", f"file://{tmp_path}/set"):
        with pytest.raises(UserError, match="is no shard's name"):
            ShardSet.open(folder)
    assert not (tmp_path / "hacked").exists()


def test_chains_and_unknown_schemes_are_refused(tmp_path):
    with pytest.raises(UserError, match="chains of URLs"):
        ShardSet.open("zip://set::http://user:pw@host/x.zip")
    with pytest.raises(UserError, match="nonsense:// is no kind of URL"):
        ShardSet.open("nonsense://host/set")


def test_a_file_system_whose_package_is_missing_is_named(monkeypatch):
    def missing(*args: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match="s3:// cannot be read: Install s3fs to access S3"):
        ShardSet.open("s3://bucket/set")


def test_folders_are_no_urls(tmp_path):
    assert not any(is_url(path) for path in (tmp_path, str(tmp_path), "data/a:b", "c:/data", Path("http://host")))
    assert all(is_url(url) for url in ("http://host/x", "s3://bucket", "gs://bucket/x", "memory://x"))
