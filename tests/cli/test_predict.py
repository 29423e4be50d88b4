"""`cvnb predict`: each image is answered or reported, as it is computed; `cvnb verify` is tested with bundles."""
from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from bundles import LABELS, make_bundle
from PIL import Image

from cvnb.cli.app import main
from cvnb.core.errors import UsageError
from cvnb.export.bundle import Bundle

Call = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle of the small classifier."
    return make_bundle(tmp_path_factory.mktemp("run"))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    "Five hundred images, one of which is none."
    (tmp_path/"photos").mkdir()
    paths = [tmp_path/f"photos/{i:03}.png" for i in range(500)]
    for i, path in enumerate(paths): Image.new("RGB", (4, 4), (i % 256, 40, 90)).save(path)
    paths[123].write_text("words")
    return paths


@pytest.fixture
def call(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Call:
    "Run `cvnb predict` in this process; return exit code and the lines of both outputs."
    def run(*args: object, given: str = "") -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["cvnb", "predict", str(bundle), *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        with pytest.raises(SystemExit) as end: main()
        found = capsys.readouterr()
        return end.value.code or 0, found.out.splitlines(), found.err.splitlines()
    return run


def test_one_bad_file_among_500_is_reported_and_the_others_are_answered(call, photos):
    code, out, error = call(*photos, "--json")
    assert code == 1 and [json.loads(line)["path"] for line in out] == [str(p) for p in photos if p != photos[123]]
    assert error[0] == f"cvnb: {photos[123]} is not an image that can be read (its bytes are no image). " \
                       "Give a whole PNG, JPEG or WebP file."
    assert error[1:] == ["cvnb: 1 of 500 images could not be read. The lines above name them."]


def test_a_missing_file_alone_is_one_line(call, tmp_path):
    code, out, error = call(tmp_path/"missing.png", "--json")
    assert code == 1 and not out and error == [f"cvnb: image {tmp_path/'missing.png'} does not exist. Check the path."]


def test_answers_come_before_later_images_are_read(bundle):
    read: list[int] = []

    def images() -> Iterator[np.ndarray]:
        for i in range(500):
            read.append(i)
            yield np.full((4, 4, 3), i % 256, np.uint8)

    answers = Bundle.load(bundle).iter_predictions(images(), batch_size=8)
    assert next(answers)["label"] in LABELS and len(read) == 8
    assert len([*answers]) == 499


def test_without_skip_a_bad_file_is_an_error(bundle, photos):
    with pytest.raises(UsageError, match="123.png is not an image"): Bundle.load(bundle).predict(photos)


def test_table_has_one_row_per_image(call, photos):
    code, out, error = call(*photos[:3])
    assert code == 0 and not error and out[0].split() == ["image", "label", "confidence"]
    assert [line.split()[0] for line in out[1:]] == [str(p) for p in photos[:3]]
    assert all(line.split()[1] in LABELS and 0 <= float(line.split()[2]) <= 1 for line in out[1:])


def test_dash_reads_paths_from_standard_input(call, photos):
    code, out, _ = call("-", "--json", given="".join(f"{p}\n" for p in photos[:4]) + "\n")
    assert code == 0 and [json.loads(line)["path"] for line in out] == [str(p) for p in photos[:4]]
    code, out, error = call("-", given="")
    assert code == 2 and not out and error == ["cvnb: there is no image to classify. Give image files, or a folder and "
                                               "--recursive."]


def test_answer_does_not_wait_for_the_next_path_on_standard_input(bundle, photos):
    command, pipe = [Path(sys.executable).with_name("cvnb"), "predict", bundle, "-", "--json"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        for path in photos[:2]:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["path"] == str(path)
        process.stdin.close()
        assert process.wait(60) == 0


def test_folder_is_taken_with_recursive_only(call, photos):
    folder = photos[0].parent
    code, out, error = call(folder)
    assert code == 2 and not out
    assert error == [f"cvnb: {folder} is a folder. Give --recursive to take the images in it."]
    code, out, error = call(folder, photos[0], "--json")
    assert code == 1 and [json.loads(line)["path"] for line in out] == [str(photos[0])]
    assert error[0] == f"cvnb: {folder} is a folder, not an image. Name files, or give --recursive."
    (folder/"b").mkdir()
    for path in photos[5:]: path.unlink()
    photos[0].rename(folder/"b/0.png")
    for name in "notes.txt", ".DS_Store", "labels.csv": (folder/name).write_text("x")
    code, out, error = call(folder, "--recursive", "--json")
    assert code == 0 and [Path(json.loads(line)["path"]).name for line in out] == [
        "001.png", "002.png", "003.png", "004.png", "0.png"]
    assert len(error) == 3 and all(line.startswith(f"! {folder}: ") and "left out" in line for line in error)
    assert any("notes.txt" in line for line in error)


def test_closed_standard_input_is_no_traceback(bundle):
    command = f"exec {Path(sys.executable).with_name('cvnb')} predict {bundle} - <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("cvnb: there is no image to classify")


def test_pipe_is_not_waited_for(call, tmp_path):
    os.mkfifo(tmp_path/"pipe.png")
    code, out, error = call(tmp_path/"pipe.png")
    assert code == 1 and "pipe.png is a pipe or a device, not a file" in error[0]


def test_control_characters_of_a_name_do_not_reach_the_terminal(call, tmp_path):
    name = tmp_path/"a\x1b[31m\nb.png"
    Image.new("RGB", (4, 4)).save(name)
    code, out, _ = call(name)
    assert code == 0 and len(out) == 2 and "\x1b" not in out[1]
    _, out, error = call(f"{name}.gone")
    assert not out and len(error) == 1 and "\x1b" not in error[0]


def test_reader_that_stops_early_gets_no_traceback(bundle, photos):
    command = [Path(sys.executable).with_name("cvnb"), "predict", bundle, photos[0].parent, "--recursive", "--json"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
