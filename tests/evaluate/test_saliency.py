"""Saliency pictures are written beside nobody else's."""
from __future__ import annotations

import pytest
from PIL import Image

from cvnb.core.errors import UsageError
from cvnb.evaluate.saliency import write_saliency


def test_folder_with_other_pictures_keeps_them(tmp_path):
    pictures = [Image.new("RGB", (4, 4))] * 2
    for _ in range(2): assert write_saliency(tmp_path/"new", pictures) == ["000.png", "001.png"]
    write_saliency(tmp_path/"new", pictures[:1])
    assert [p.name for p in (tmp_path/"new").iterdir()] == ["000.png"]
    Image.new("RGB", (4, 4)).save(tmp_path/"cat.png")
    with pytest.raises(UsageError, match="holds cat.png, which is not one of its pictures"):
        write_saliency(tmp_path, pictures)
    assert (tmp_path/"cat.png").exists()
