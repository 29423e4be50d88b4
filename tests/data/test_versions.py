"""The digest of a data set: which changes it notices."""
from __future__ import annotations

from PIL import Image

from cvnb.data.dataset import scan_dataset
from cvnb.data.images import inspect_images
from cvnb.data.versions import dataset_digest


def test_digest_changes_when_a_missing_image_appears(write_classes, tmp_path):
    folder = write_classes(tmp_path/"photos", a=3, b=3)
    rows = "".join(f"photos/{p.relative_to(folder)},{p.parent.name}\n" for p in folder.rglob("*.png"))
    (tmp_path/"x.csv").write_text("path,label\nphotos/gone.png,a\n" + rows)
    before = dataset_digest(tmp_path/"x.csv")
    Image.new("L", (8, 8)).save(folder/"gone.png")
    assert dataset_digest(tmp_path/"x.csv") != before


def test_digest_covers_images_with_absolute_paths(write_classes, tmp_path):
    folder = write_classes(tmp_path/"photos", a=3, b=3)
    (tmp_path/"tables").mkdir()
    table = tmp_path/"tables/photos.csv"
    paths = sorted(folder.rglob("*.png"))
    table.write_text("path,label\n" + "".join(f"{p},{p.parent.name}\n" for p in paths))
    before = dataset_digest(table)
    Image.new("L", (8, 8)).save(paths[0])
    assert dataset_digest(table) != before


def test_row_that_names_a_folder_is_digested_and_left_out(write_classes, tmp_path):
    folder = write_classes(tmp_path/"photos", a=3, b=3)
    rows = "".join(f"photos/{p.relative_to(folder)},{p.parent.name}\n" for p in folder.rglob("*.png"))
    (tmp_path/"x.csv").write_text("path,label\nphotos/a,a\n" + rows)
    assert dataset_digest(tmp_path/"x.csv") == dataset_digest(tmp_path/"x.csv")
    inspected = inspect_images(tmp_path, scan_dataset(tmp_path/"x.csv"))
    assert inspected.ok.tolist().count(False) == 1
