"""A small run with made-up predictions, its dashboard, and what stands on the page."""
from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image

from cvnb.core.files import write_json
from cvnb.core.stage import Stage
from cvnb.data.tables import write_table

# Class names come from folder names, and a folder may have any name.
CLASSES = ["<img src=x onerror=document.title='owned'>", "a$b$", "cat", "dog"]
SECONDS = 60_000   # what a loaded machine may take, in ms


def make_predictions(rows: pd.DataFrame, rng: np.random.Generator, wrong: float) -> pd.DataFrame:
    "Make up predictions, a share of them wrong."
    labels = rows.label.map(CLASSES.index).to_numpy()
    guess = np.where(rng.random(len(rows)) < wrong, (labels + rng.integers(1, 4, len(rows))) % 4, labels)
    confidence = rng.uniform(0.4, 1, len(rows)).astype(np.float32)
    proba = np.repeat((1 - confidence[:, None]) / 3, 4, axis=1)
    proba[np.arange(len(rows)), guess] = confidence
    table = rows[["path", "split", "label"]].reset_index(drop=True)
    table["predicted"] = [CLASSES[i] for i in guess]
    table["confidence"] = confidence.astype(float)
    table["correct"] = table.label == table.predicted
    table["probabilities"] = list(proba)
    return table


def save_weights(folder: Path) -> None:
    "Save an untrained model."
    from cvnb.models.weights import create_model, save_model
    save_model(create_model("resnet10t", CLASSES, 16), folder)


def make_run(folder: Path, wrong: float = 0.4, weights: bool = False) -> Path:
    "Write images and the files of the audit and train stages; only the errors stage needs weights."
    rng = np.random.default_rng(0)
    rows = []
    for i in range(200):
        label = CLASSES[i % 4]
        (folder/"data"/label).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 1 + rng.integers(20, 255), (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/"data"/label/f"{i:03}.png")
        rows.append(dict(
            path=f"{label}/{i:03}.png", label=label,
            split="test" if i < 140 else "val", ok=True, error="", kind="", excluded=False,
            pixel_sha256=f"{i:064x}", width=12, height=12, brightness=float(pixels.mean()),
            contrast=float(pixels.std()),
            tags=["near_duplicate"] if i % 7 == 0 else [], label_score=float(rng.random()),
            meta_camera="old" if i % 3 else "new"))
    audit = Stage("audit", folder/"run")
    write_table(audit.path("manifest.parquet"), pd.DataFrame(rows))
    vectors = np.random.default_rng(0).normal(size=(len(rows), 8)).astype(np.float32)   # of the images, in their order
    np.save(audit.path("embeddings.npy"), vectors)
    write_json(audit.path("audit.json"), dict(task="classification", data=str(folder/"data"), root=str(folder/"data"),
                                              classes=CLASSES))
    audit.finish()
    train = Stage("train", folder/"run")
    write_table(train.path("predictions.parquet"), make_predictions(pd.DataFrame(rows), rng, wrong))
    write_json(train.path("model.json"), dict(backbone="resnet10t", classes=CLASSES, image_size=12,
                                                mean=[0.5] * 3, std=[0.5] * 3))
    write_json(train.path("metrics.json"), dict(history=[], figures={}))   # as earlier versions wrote it
    if weights: save_weights(train.path("model.safetensors").parent)
    train.finish()
    return folder/"run"


def read_table(run: Path, split: str) -> pd.DataFrame:
    "Read the predictions on a split with the audit's columns, most confident first; `row` is that of the page."
    predictions = pd.read_parquet(run/"train"/"predictions.parquet").sort_values("path", ignore_index=True)
    manifest = pd.read_parquet(run/"audit"/"manifest.parquet").drop(columns=["label", "split"])
    table = predictions.assign(row=range(len(predictions))).merge(manifest, on="path")
    return table[table.split == split].sort_values("confidence", ascending=False, kind="stable")


@dataclass
class Served:
    "A dashboard that is being served."
    url: str
    process: subprocess.Popen
    browser: psutil.Process | None = None   # what `BROWSER` names; it stays in the foreground
    opened: str = ""                        # what the browser was given


def serve(run: Path, folder: Path | None = None, reference: Path | str = "") -> Served:
    "Serve a run's dashboard in a process of its own, as the command line does; with a folder also open a browser."
    code = ("import sys; from cvnb.evaluate.voila_server import serve_dashboard; "
            f"serve_dashboard(sys.argv[1], open_browser={folder is not None}, reference=sys.argv[2])")
    env = os.environ | (dict(BROWSER=f"{make_browser(folder)} %s") if folder else {})
    process = subprocess.Popen([sys.executable, "-c", code, str(run), str(reference)], stdout=subprocess.PIPE,
                               text=True, env=env, cwd=run.parent)
    url = re.search(r"http://\S+", process.stdout.readline())[0]
    return Served(url, process, *(wait_for_browser(folder) if folder else ()))


def make_browser(folder: Path) -> Path:
    "Write a browser that notes its process number and what it is given, and stays in the foreground."
    script = folder/"browser"
    script.write_text(f'#!/bin/sh\necho $$ "$1" > {folder}/new\nmv {folder}/new {folder}/opened\nexec sleep 600\n')
    script.chmod(0o700)
    return script


def wait_for_browser(folder: Path) -> tuple[psutil.Process, str]:
    "Wait until a browser of `make_browser` has been started."
    end = time.monotonic() + 60
    while not (folder/"opened").exists() and time.monotonic() < end: time.sleep(0.05)
    pid, opened = (folder/"opened").read_text().split()
    return psutil.Process(int(pid)), opened


Caption = tuple[int, str, str, str]   # row of the table, predicted class, true class, confidence


def captions(page) -> list[Caption]:
    "Read the tiles that are in the page, in the order of the grid."
    read = """tiles => tiles.map(t => [t.style.transform.match(/[0-9.]+/g).map(Number).reverse(), [+t.dataset.row,
        t.querySelector('.answer .name').textContent, t.querySelector('.truth .name').textContent,
        t.querySelector('.sure').textContent]]).sort((a, b) => a[0][0] - b[0][0] || a[0][1] - b[0][1]).map(x => x[1])"""
    return [tuple(c) for c in page.eval_on_selector_all(".grid .tile", read)]


def agrees(page, rows: pd.DataFrame) -> bool:
    "Wait until the count is that of `rows` and the grid begins with the first of them."
    wanted = [(row.row, row.predicted, row.label, f"{100 * row.confidence:.1f} %") for row in rows.itertuples()]
    end = time.monotonic() + 15
    while time.monotonic() < end:
        found = page.locator(".count").text_content(), captions(page)
        fits = found[1] == wanted[:len(found[1])] and bool(found[1]) == bool(wanted)
        if found[0] == f"{len(rows):,}" and fits: return True
        page.wait_for_timeout(50)
    assert found == (f"{len(rows):,}", wanted[:len(found[1])])
    return False


def choose(page, name: str, value: str) -> None:
    "Choose a value of a filter."
    page.locator(f'.choice[data-name="{name}"] select').first.select_option(value)
