"""`cvnb predict`: each image is answered or reported, as it is computed; `cvnb verify` is tested with bundles."""
from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bundles import LABELS, make_bundle
from PIL import Image

from cvnb.cli.app import main
from cvnb.core.errors import CvnbError, UsageError
from cvnb.export.bundle import Bundle
from cvnb.export.prediction_file import PredictionFile

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
    remedy = "Name files; on the command line, --recursive takes folders."
    assert error[0] == f"cvnb: {folder} is a folder, not an image. {remedy}"
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


def read_csv(path: Path) -> list[dict[str, str]]:
    "Read a file of predictions."
    with open(path, newline="", encoding="utf-8") as file: return list(csv.DictReader(file))


def test_file_of_predictions_has_the_answers_of_single_calls_and_a_row_per_bad_image(call, photos, tmp_path):
    out = tmp_path/"answers.csv"
    code, _, error = call(tmp_path/"photos", "--out", out, "--jobs", 3)
    rows = read_csv(out)
    assert code == 1 and error[-1] == "cvnb: 1 of 500 images could not be read. The column error says why."
    assert sorted(row["path"] for row in rows) == sorted(map(str, photos))
    (bad,) = [row for row in rows if row["error"]]
    assert bad["path"] == str(photos[123]) and "no image" in bad["error"] and bad["label"] == bad["confidence"] == ""
    _, single, _ = call(*photos[:5], "--json")
    by_path = {row["path"]: row for row in rows}
    for answer in map(json.loads, single):
        row = by_path[answer["path"]]
        assert row["label"] == answer["label"] and float(row["confidence"]) == pytest.approx(answer["confidence"])
        assert float(row[f"probability_{LABELS[0]}"]) == pytest.approx(answer["probabilities"][LABELS[0]])
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_formats_hold_the_same_rows(call, photos, tmp_path, suffix):
    out = tmp_path/f"answers{suffix}"
    assert call(*photos[120:126], "--out", out)[0] == 1
    if suffix == ".jsonl": rows = [json.loads(line) for line in out.read_text().splitlines()]
    else: rows = pq.read_table(out).to_pylist()
    assert len(rows) == 6 and [row["path"] for row in rows if row["error"]] == [str(photos[123])]
    assert {row["label"] for row in rows} <= {*LABELS, None}


def test_a_killed_call_goes_on_where_it_ended(bundle, photos, tmp_path):
    out = tmp_path/"answers.csv"
    cvnb = Path(sys.executable).with_name("cvnb")
    command = [cvnb, "predict", bundle, tmp_path/"photos", "--out", out]
    journal = tmp_path/"answers.csv.part"
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 40): time.sleep(0.002)
    child.kill()
    child.wait()
    if out.exists(): pytest.skip("the machine was too fast to be interrupted")
    answered = journal.read_bytes().count(b"\n") - 1
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and re.search(r"\d+ of 500 images have an answer in", again.stderr)
    assert answered >= 39 and len(read_csv(out)) == 500 and not journal.exists()


def test_a_journal_gives_no_answer_for_a_changed_image_or_another_bundle(bundle, photos, tmp_path):
    out = tmp_path/"answers.jsonl"
    answer = lambda path: dict(path=str(path), label="a", confidence=1.0, probabilities={})
    first = PredictionFile(out, LABELS, dict(name="one"))
    for path in photos[:3]: first.add(answer(path))
    first.close()
    Image.new("RGB", (9, 9)).save(photos[1])
    with pytest.raises(UsageError, match="answers.jsonl.part holds predictions of another bundle. Delete it"):
        PredictionFile(out, LABELS, dict(name="two"))
    again = PredictionFile(out, LABELS, dict(name="one"))
    assert [*again.select(map(str, photos[:4]))] == [str(photos[1]), str(photos[3])]
    again.add(answer(photos[1]) | dict(label="b"))
    with pytest.raises(CvnbError, match="is being written by another call"):
        PredictionFile(out, LABELS, dict(name="one"))
    order = [str(photo) for photo in reversed(photos[:4])]   # the last has no answer
    assert again.finish(order, {str(photos[0]): "first.png"}) == 3
    rows = [*map(json.loads, out.read_text().splitlines())]
    assert [row["path"] for row in rows] == [*order[1:3], "first.png"]
    labels = {row["path"].replace("first.png", str(photos[0])): row["label"] for row in rows}
    assert labels == {str(photos[0]): "a", str(photos[1]): "b", str(photos[2]): "a"}


def test_a_cut_line_of_a_journal_is_answered_again(photos, tmp_path):
    file = PredictionFile(tmp_path/"a.csv", LABELS, {})
    for path in photos[:2]: file.add(dict(path=str(path), label="a", confidence=1.0, probabilities={}))
    file.close()
    whole = file.journal.read_bytes()
    file.journal.write_bytes(whole[:-7])
    again = PredictionFile(tmp_path/"a.csv", LABELS, {})
    assert [*again.select(map(str, photos[:2]))] == [str(photos[1])]
    again.close()
    assert whole.startswith(file.journal.read_bytes())


def test_a_table_lists_images_beside_it(call, photos, tmp_path):
    (tmp_path/"table.csv").write_text("label,path\nx,photos/001.png\ny,photos/002.png\n")
    pq.write_table(pa.table(dict(path=["photos/003.png"])), tmp_path/"table.parquet")
    code, _, error = call(tmp_path/"table.csv", tmp_path/"table.parquet", photos[1], "--out", tmp_path/"out.csv")
    assert any("1 paths are given more than once and have one row" in line for line in error)
    names = [row["path"] for row in read_csv(tmp_path/"out.csv")]
    assert code == 0 and names == ["photos/001.png", "photos/002.png", "photos/003.png"]   # as the tables have them


def test_two_tables_with_one_name_for_two_images_have_whole_paths(call, photos, tmp_path):
    for folder in "a", "b":
        (tmp_path/folder).mkdir()
        (tmp_path/folder/"x.png").write_bytes(photos[0].read_bytes())
        (tmp_path/folder/"t.csv").write_text("path\nx.png\n")
    code, _, error = call(tmp_path/"a/t.csv", tmp_path/"b/t.csv", "--out", tmp_path/"out.csv")
    assert any("one path for different images" in line for line in error)
    paths = [row["path"] for row in read_csv(tmp_path/"out.csv")]
    assert code == 0 and paths == [str(tmp_path/"a/x.png"), str(tmp_path/"b/x.png")]


def test_rows_of_unreadable_images_stand_at_their_places(call, photos, tmp_path):
    (tmp_path/"many").mkdir()
    for i in range(40): (tmp_path/f"many/{i:03}.png").write_bytes(photos[0].read_bytes() if i % 7 else b"words")
    code, *_ = call(tmp_path/"many", "--out", tmp_path/"out.csv", "--jobs", 3)
    names = [Path(row["path"]).name for row in read_csv(tmp_path/"out.csv")]
    assert code == 1 and names == [f"{i:03}.png" for i in range(40)]


WRONG_FILES = {
    "ending": (["out.txt"], "out.txt has no ending of a file of predictions. Use one of .csv, .jsonl, .parquet."),
    "exists": (["old.csv"], "old.csv exists. Give another file with --out, or delete this one."),
    "folder": (["none/out.csv"], "out.csv does not exist. Create it"),
    "json": (["out.csv", "--json"], "--json prints single answers, and --out writes a file"),
    "column": (["out.csv"], "names.csv has no column path, only file."),
    "empty": (["out.csv"], "1 rows of names.csv have no path"),
    "nothing": (["out.csv"], "there is no image to classify"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_refused_in_one_line(call, photos, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"old.csv").write_text("mine")
    (tmp_path/"void").mkdir()
    (tmp_path/"names.csv").write_text("path,label\n,x\n" if case == "empty" else "file\na.png\n")
    given = {"column": "names.csv", "empty": "names.csv", "nothing": "void"}.get(case, photos[0])
    args, message = WRONG_FILES[case]
    code, _, error = call(given, "--out", *args)
    assert code == 2 and message in error[-1] and (tmp_path/"old.csv").read_text() == "mine"
    assert not (tmp_path/"out.csv").exists()


def test_options_of_a_cluster_are_refused_where_they_do_nothing(call, photos, tmp_path):
    for args, message in [
        ((photos[0], "--engine", "ray"), "--engine and --address need --out. Add --out FILE."),
        ((photos[0], "--jobs", 2), "--jobs needs --out. Add --out FILE."),
        ((photos[0], "--out", tmp_path/"a.csv", "--engine", "rey"), "no engine 'rey'. Did you mean 'ray'?"),
        ((photos[0], "--out", tmp_path/"a.csv", "--engine", "threads", "--address", "1.2.3.4:5"),
         "--address 1.2.3.4:5 is that of a Ray cluster. Drop it, or add --engine ray.")]:
        code, out, error = call(*args)
        assert code == 2 and error[-1] == f"cvnb: {message}" and not (tmp_path/"a.csv").exists()
    code, _, error = call(photos[0], "--out", tmp_path/"a.csv", "--address", "127.0.0.1:1")
    assert code == 2 and "no Ray cluster answers at 127.0.0.1:1" in error[-1] and len(error[-1]) < 400


@pytest.mark.long
@pytest.mark.timeout(900)
def test_cluster_that_loses_a_node_gives_the_answers_of_one_machine(bundle, call, tmp_path, ray_cluster):
    folder = tmp_path/"many"
    folder.mkdir()
    for i in range(6000): Image.new("RGB", (4, 4), (i % 256, i // 256, 90)).save(folder/f"{i:04}.png")
    (folder/"0123.png").write_text("words")
    args = [Path(sys.executable).with_name("cvnb"), "predict", str(bundle), str(folder), "--out"]
    with open(tmp_path/"log", "w") as log:
        process = subprocess.Popen([*args, tmp_path/"ray.jsonl", "--address", ray_cluster.address], stderr=log)
    journal = tmp_path/"ray.jsonl.part"
    deadline = time.monotonic() + 300
    while not journal.exists() or journal.read_bytes().count(b"\n") < 300:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path/"log").read_text()
        time.sleep(0.05)
    answered = journal.read_bytes().count(b"\n")
    ray_cluster.remove_node(next(iter(ray_cluster.worker_nodes)), allow_graceful=False)
    assert process.wait(400) == 1, "one file is no image"
    assert answered < 5000, "the node was lost while there was work"
    code, _, error = call(folder, "--out", tmp_path/"threads.jsonl")
    assert code == 1 and error[-1] == "cvnb: 1 of 6,000 images could not be read. The column error says why."
    assert (tmp_path/"log").read_text().splitlines()[-1] == error[-1]
    rows = [sorted((tmp_path/f"{name}.jsonl").read_text().splitlines()) for name in ("ray", "threads")]
    assert len(rows[0]) == 6000 and rows[0] == rows[1]


def test_missing_folder_is_refused_before_a_file_is_written(call, tmp_path):
    code, out, error = call(tmp_path/"fotos", "--out", tmp_path/"a.csv")
    assert code == 2 and not out and not [*tmp_path.iterdir()]
    assert error[-1] == f"cvnb: {tmp_path/'fotos'} does not exist. Give image files, folders or tables."
