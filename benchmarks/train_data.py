"""The folders that both sides of the training benchmark read: train/, val/ and test/, with a folder per class."""
from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cvnb.core.system import n_cores
from cvnb.data.dataset import data_root, locate_data, scan_dataset
from cvnb.data.images import inspect_images, open_image
from cvnb.data.splits import assign_splits
from cvnb.data.tables import write_table


def prepare_folders(
    source: str,               # a known name, or a folder of classes
    target: Path,              # gets SPLIT/CLASS/FILE and manifest.parquet
    val_share: float = 0.15,   # share of each class for validation
    limit: int = 0,            # images per split, spread over the classes; 0 takes all
    side: int = 0,             # pixels: writes JPEG files of this side; 0 links to the original files
) -> Path:                     # `target`
    "Lay a data set out for cvnb and for torchvision's ImageFolder, and list it as the audit does."
    root = data_root(source := locate_data(source))
    table = inspect_images(root, scan_dataset(source))
    table = assign_splits(table[table.ok].reset_index(drop=True), val_share)
    if limit: table = table.groupby(["split", "label"]).head(-(-limit // table.label.nunique())).reset_index(drop=True)
    names = []
    for i, row in enumerate(table.itertuples()):
        names.append(f"{row.split}/{row.label}/{i:06}{'.jpg' if side else Path(row.path).suffix}")
    for folder in {str(Path(name).parent) for name in names}: (target/folder).mkdir(parents=True, exist_ok=True)

    def place(path: str, name: str) -> None:
        if side: open_image(root/path).resize((side, side), resample=3).save(target/name, quality=90)
        else: os.symlink(root/path, target/name)

    with ThreadPoolExecutor(n_cores()) as pool: list(pool.map(place, table.path, names))
    table = inspect_images(target, table[["label", "split"]].assign(path=names)) if side else table.assign(path=names)
    write_table(target/"manifest.parquet", table)
    return target

