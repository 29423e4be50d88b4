"""How long the dashboard takes in Chromium on 10,000 predictions: from the address to the first paint, and per filter.

    python benchmarks/dashboard.py [RUN] [--predictions 10000] [--classes 10] [--repeats 15] [--write]

Without RUN, a run is written with images of 64 × 64 pixels. Each figure is a median and the slowest of the repeats.
The first paint ends when headline figures, confusion matrix and the first row of captions stand on the page; `images`
ends when the pictures in view have loaded. A filter's answer ends when the page has drawn what it selects; `interval`
ends when the kernel's interval stands in the card.
"""
from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from table import show

from cvnb.core.files import write_json
from cvnb.core.stage import Stage
from cvnb.data.tables import write_table

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]


def make_run(folder: Path, n: int, n_classes: int) -> Path:
    "Write images and the files of a finished audit and training, a fifth of its predictions wrong."
    rng = np.random.default_rng(0)
    classes = [f"class {i:03}" for i in range(n_classes)]
    labels = rng.integers(0, n_classes, n)
    predicted = np.where(rng.random(n) < 0.2, rng.integers(0, n_classes, n), labels)
    least = 1 / n_classes
    confidence = least + (1 - least) * np.where(predicted == labels, rng.beta(8, 1, n), rng.beta(3, 2, n))
    rest = rng.dirichlet(np.full(n_classes, 0.3), n)
    rest[np.arange(n), predicted] = 0
    rest *= ((1 - confidence) / np.maximum(rest.sum(1), 1e-9))[:, None]
    rest[np.arange(n), predicted] = confidence
    (folder/"data").mkdir(parents=True)
    blocks = rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)
    for i in range(n): Image.fromarray(blocks[i].repeat(8, 0).repeat(8, 1)).save(folder/"data"/f"{i:05}.png")
    names = np.array(classes)
    rows = pd.DataFrame(dict(
        path=[f"{i:05}.png" for i in range(n)], label=names[labels], split="test", ok=True, error="",
        pixel_sha256=[f"{i:064x}" for i in range(n)], width=64, height=64, brightness=blocks.mean((1, 2, 3)),
        contrast=blocks.std((1, 2, 3)), tags=[["near_duplicate"] * (i % 9 == 0) for i in range(n)],
        label_score=rng.random(n), meta_camera=rng.choice(["phone", "webcam", "scanner"], n),
        meta_hour=rng.uniform(0, 24, n)))
    audit = Stage("audit", folder/"run")
    write_table(audit.path("manifest.parquet"), rows)
    write_json(audit.path("audit.json"), dict(task="classification", data=str(folder/"data"), root=str(folder/"data"),
                                              classes=classes))
    audit.finish()
    train = Stage("train", folder/"run")
    table = rows[["path", "split", "label"]].assign(
        predicted=names[predicted], confidence=confidence, correct=predicted == labels,
        probabilities=list(rest.astype(np.float32)))
    write_table(train.path("predictions.parquet"), table)
    write_json(train.path("model.json"), dict(backbone="resnet18", classes=classes, image_size=64, mean=[0.5] * 3,
                                              std=[0.5] * 3))
    write_json(train.path("metrics.json"), dict(history=[], figures={}))
    train.finish()
    write_json(folder/"run"/"run.json", {})
    return folder/"run"


@contextlib.contextmanager
def served(run: Path) -> Iterator[str]:
    "Serve a run as `cvnb dashboard` does."
    command = [Path(sys.executable).with_name("cvnb"), "dashboard", run, "--no-open"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        while not (found := re.search(r"http://\S+", process.stdout.readline())): pass
        yield found[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


CLOCK = """() => { const root = document.querySelector('.cvnb');
  return !!root && root.querySelectorAll('.tile').length > 0
  && root.querySelectorAll('.card strong').length > 2 && !!root.querySelector('.matrix svg') }"""
LOADED = """() => { const images = [...document.querySelectorAll('.tile .picture')].filter(p => {
  const box = p.getBoundingClientRect(); return box.top < innerHeight && box.bottom > 0 });
  return images.length > 0 && images.every(p => p.querySelector('img')?.complete || p.querySelector('.none')) }"""
ANSWER = """async ([act, value]) => {
  const root = document.querySelector('.cvnb'), began = performance.now(), before = root.dataset.measured;
  const select = name => { const s = root.querySelector(`.choice[data-name="${name}"] select`); s.value = value;
    s.dispatchEvent(new Event('change')) };
  const click = selector => { const all = root.querySelectorAll(selector); all[+value % all.length].dispatchEvent(
    new MouseEvent('click', {bubbles: true})) };
  if (act.startsWith('.')) click(act); else select(act);
  await new Promise(done => requestAnimationFrame(() => setTimeout(done)));   // painted
  const drawn = performance.now() - began;
  while (root.dataset.measured === before && performance.now() - began < 10000)
    await new Promise(done => setTimeout(done, 5));
  return [drawn, performance.now() - began] }"""


def measure(run: Path, repeats: int) -> pd.DataFrame:   # what, median_ms, slowest_ms, n
    "Open the page again and again, and filter it."
    from playwright.sync_api import sync_playwright
    times: dict[str, list[float]] = {}
    note: Callable[[str, float], None] = lambda what, ms: times.setdefault(what, []).append(ms)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with served(run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1400, height=1000))
        for _ in range(repeats):
            time.sleep(8)   # the next kernel starts beside the open page
            began = time.perf_counter()
            page.goto(address, wait_until="commit")
            page.wait_for_function(CLOCK, timeout=60_000, polling=20)
            note("first paint", 1000 * (time.perf_counter() - began))
            page.wait_for_function(LOADED, timeout=60_000, polling=20)
            note("first paint, images", 1000 * (time.perf_counter() - began))
        page.wait_for_timeout(1000)
        names = page.locator('.choice[data-name="True class"] option')
        classes = names.evaluate_all("o => o.map(x => x.value).filter(x => x)")
        for i in range(repeats):
            steps = [("filter: class", "True class", classes[i % len(classes)]), ("filter: all images", "Show", "all"),
                     ("filter: reset", ".reset", "0"), ("filter: slice", ".slice", str(i)),
                     ("filter: reset", ".reset", "0"), ("filter: order", "Order", ["path", "confident"][i % 2])]
            for what, act, value in steps:
                drawn, interval = page.evaluate(ANSWER, [act, value])
                note(what, drawn)
                note(f"{what}, interval", interval)
        browser.close()
    rows = [dict(what=what, median_ms=np.median(ms), slowest_ms=max(ms), n=len(ms)) for what, ms in times.items()]
    return pd.DataFrame(rows).round(0)


def main() -> None:
    "Measure, print a table, and write it."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--predictions", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--keep", type=Path, help="write the run here and keep it")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/dashboard.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = given.run or make_run(given.keep or Path(temporary), given.predictions, given.classes)
        table = measure(run.resolve(), given.repeats)
    show("dashboard", f"The dashboard in Chromium, {given.predictions:,} predictions", table.to_dict("records"),
         given.write)


if __name__ == "__main__": main()
