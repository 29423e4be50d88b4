"""Modes of files, and who may write to the folders that cvnb trusts."""
from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from cvnb.core.cache import RowCache, cache_dir
from cvnb.core.errors import CvnbError
from cvnb.core.files import _is_private_group, atomic_path, check_trusted, write_json
from cvnb.core.stage import lock_run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are POSIX's")
STRANGER = 12_345


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    "The umask of the test."
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    "A temporary folder that other users can reach; pytest's lie in one of mode 0700."
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A cache that does not exist yet."
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"cache"))
    monkeypatch.delenv("CVNB_CACHE_SHARED", raising=False)
    return tmp_path/"cache"


def save_weights(path: Path) -> None:
    "Write a small model as a run does."
    from cvnb.models.weights import create_model, save_model
    save_model(create_model("resnet10t", ["a", "b"], 16), path)


def write_private(path: Path) -> None:
    "Write a file as a library does that writes through a private temporary file."
    with atomic_path(path) as temp, open(os.open(temp, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file: file.write("a")


def save_table(path: Path) -> None:
    from cvnb.data.tables import write_table
    write_table(path, pd.DataFrame(dict(a=[1])))



WRITERS: dict[str, Callable[[Path], object]] = dict(json=lambda path: write_json(path, {}), weights=save_weights,
                                                    parquet=save_table, private=write_private)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], indirect=True, ids=oct)
@pytest.mark.parametrize("writer", WRITERS)
def test_file_has_the_mode_that_open_gives(writer: str, umask: int, tmp_path: Path) -> None:
    WRITERS[writer](tmp_path/"new.parquet")
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~umask}


def test_files_of_a_run_have_one_mode(smoke_run: Path) -> None:
    modes = {p.relative_to(smoke_run): stat.S_IMODE(p.stat().st_mode) for p in smoke_run.rglob("*")
             if p.is_file() and "wandb" not in p.relative_to(smoke_run).parts}   # W&B's own files are W&B's
    plain = stat.S_IMODE((smoke_run/"run.json").stat().st_mode)
    assert len(modes) > 20 and {str(p): oct(m) for p, m in modes.items() if m != plain} == {}
    current = os.umask(0)
    os.umask(current)
    assert plain == 0o666 & ~current


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702, 0o770])
def test_folder_that_others_may_write_to_is_refused(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvnb.core.files._is_private_group", lambda number: False)
    (tmp_path/"open").mkdir()
    (tmp_path/"open").chmod(mode)
    with pytest.raises(CvnbError, match=f"{tmp_path}/open can be written by .*mode {mode:04o}.*`chmod -R go-w"):
        check_trusted(tmp_path/"open")


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0: os.chown(tmp_path, STRANGER, -1)
    else: monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    with pytest.raises(CvnbError, match=r"belongs to user \d+ \(mode 0755\).* Use a folder"): check_trusted(tmp_path)


def test_folder_that_nobody_else_can_reach_is_trusted(tmp_path: Path) -> None:
    (tmp_path/"home/open").mkdir(parents=True)
    (tmp_path/"home/open").chmod(0o777)
    (tmp_path/"home").chmod(0o700)
    assert check_trusted(tmp_path/"home/open")
    (tmp_path/"home").chmod(0o710)
    with pytest.raises(CvnbError): check_trusted(tmp_path/"home/open")


def test_private_folder_below_a_sticky_one_is_trusted(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path/"mine").mkdir(0o755)
    assert check_trusted(tmp_path/"mine") and check_trusted(tmp_path/"none")
    assert check_trusted("/")   # root's


def test_group_writable_folder_is_trusted_only_for_the_users_private_group(tmp_path: Path) -> None:
    (tmp_path/"group").mkdir()
    (tmp_path/"group").chmod(0o775)
    number = (tmp_path/"group").stat().st_gid
    if _is_private_group(number): assert check_trusted(tmp_path/"group")
    else:
        with pytest.raises(CvnbError, match=f"by group {number}"): check_trusted(tmp_path/"group")
    assert not _is_private_group(54_321)


def test_cache_is_private_and_planted_ones_are_refused(cache: Path) -> None:
    folder = cache_dir("rows", "pixels")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and not folder.exists()
    folder.mkdir(parents=True)
    cache.chmod(0o755)
    for planted in folder, folder.parent, cache:
        planted.chmod(0o777)
        message = f"{planted} can be written by every user.*`chmod -R go-w {planted}` .* or set CVNB_CACHE"
        with pytest.raises(CvnbError, match=message):
            RowCache("pixels", (2,), "uint8")
        planted.chmod(0o755)
    assert RowCache("pixels", (2,), "uint8").folder == folder


def test_shared_cache_is_used_where_the_user_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    cache.chmod(0o2777)
    with pytest.raises(CvnbError, match="CVNB_CACHE_SHARED=1"): cache_dir("rows")
    monkeypatch.setenv("CVNB_CACHE_SHARED", "1")
    assert cache_dir("rows") == cache/"rows"


@pytest.mark.parametrize("folder", ["data/digits", "archives", "digests-3", "sources/hf", ""])
def test_each_user_of_the_cache_refuses_a_planted_folder(folder: str, cache: Path, tmp_path: Path) -> None:
    from cvnb.core.cache import cache_dir
    from cvnb.data import archives, named, sources, versions
    archive = tmp_path/"a.zip"
    archive.touch()
    for label in "ab":
        (tmp_path/"images"/label).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path/"images"/label/"0.png")
    (cache/folder).mkdir(parents=True)
    (cache/folder).chmod(0o777)
    use = {"data/digits": lambda: named.prepare_dataset(named.NAMED_DATASETS["digits"], print),
           "archives": lambda: archives.unpack_archive(archive), "sources/hf": lambda: sources._table_folder("hf", "a"),
           "digests-3": lambda: versions.dataset_digest(tmp_path/"images"), "": lambda: cache_dir("rows")}[folder]
    with pytest.raises(CvnbError, match="can be written by every user"): use()


def test_weights_of_a_planted_cache_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cvnb.models.weights import create_model
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    (tmp_path/"hub").mkdir()
    (tmp_path/"hub").chmod(0o777)
    with pytest.raises(CvnbError, match="hub can be written by every user.*HF_HUB_CACHE"):
        create_model("resnet10t", ["a", "b"], 32, weights="imagenet")


def test_fork_server_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cvnb.pipeline.kernels import FORK_SERVER_VARIABLE, ForkKernelManager, start_fork_server
    tmp_path.chmod(0o777)
    monkeypatch.setenv(FORK_SERVER_VARIABLE, str(tmp_path/"fork"))
    for use in start_fork_server, ForkKernelManager:
        with pytest.raises(CvnbError, match=f"every user.* or unset {FORK_SERVER_VARIABLE}"): use()


def test_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path/"precious").write_text("a")
    (tmp_path/".lock").symlink_to(tmp_path/"precious")
    with pytest.raises(CvnbError, match=r"\.lock cannot be locked"), lock_run(tmp_path): pass
    assert (tmp_path/"precious").read_text() == "a"


def test_command_line_names_a_planted_cache_in_one_line(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    command = [Path(sys.executable).with_name("cvnb"), "data", "check", "digits"]
    found = subprocess.run(command, capture_output=True, text=True)
    said = " ".join((found.stdout + found.stderr).split())
    assert found.returncode == 1 and "can be written by every user (mode 0777)" in said and "Traceback" not in said
