"""The folders that both sides of the training benchmark read: real images in train/, val/ and test/, a folder per class."""
from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cvnb.core.system import n_cores
from cvnb.data.tables import data_root, locate, scan, write_table
from cvnb.data.splits import assign_splits
from cvnb.data.images import inspect, open_image


def folders(
    source: str,               # a known name, or a folder of classes
    target: Path,              # gets SPLIT/CLASS/FILE and manifest.parquet
    val_share: float = 0.15,   # share of each class for validation
    limit: int = 0,            # images per split, spread over the classes; 0 is all
    side: int = 0,             # pixels; images are written anew as JPEG of this side, 0 links to the files as they are
) -> Path:                     # `target`
    "Lay a data set out once for cvnb and for torchvision's ImageFolder, and list it as the audit does."
    root = data_root(source := locate(source))
    table = inspect(root, scan(source))
    table = assign_splits(table[table.ok].reset_index(drop=True), val_share)
    if limit: table = table.groupby(["split", "label"]).head(-(-limit // table.label.nunique())).reset_index(drop=True)
    names = [f"{s}/{label}/{i:06}{'.jpg' if side else Path(p).suffix}" for i, (s, label, p) in enumerate(zip(table.split, table.label, table.path))]
    for folder in {str(Path(n).parent) for n in names}: (target/folder).mkdir(parents=True, exist_ok=True)

    def put(path: str, name: str) -> None:
        if side: open_image(root/path).resize((side, side), resample=3).save(target/name, quality=90)
        else: os.symlink(root/path, target/name)

    with ThreadPoolExecutor(n_cores()) as pool: [*pool.map(put, table.path, names)]
    table = inspect(target, table[["label", "split"]].assign(path=names)) if side else table.assign(path=names)
    write_table(target/"manifest.parquet", table)
    return target

