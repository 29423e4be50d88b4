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


def shortcut_model(backbone: str, side: int):
    "Train a network on images whose class is told by a bright patch in one corner."
    import numpy as np
    import torch

    from cvnb.models.weights import create_model
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 160)
    images = rng.integers(0, 160, (160, side, side, 3)).astype(np.uint8)
    patch = side // 4
    images[labels == 1, side - patch:, side - patch:] = 255
    model = create_model(backbone, ["a", "b"], side)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(40):
        rows = rng.choice(160, 32, replace=False)
        optimizer.zero_grad()
        logits = model.train()(torch.from_numpy(images[rows]))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows])).backward()
        optimizer.step()
    return model.eval(), images[labels == 1][:8], patch


@pytest.mark.parametrize(("backbone", "side"), [
    ("resnet10t", 32), pytest.param("test_vit", 96, marks=pytest.mark.slow)])
def test_maps_point_to_a_planted_shortcut_and_depend_on_the_weights(backbone: str, side: int) -> None:
    import numpy as np

    from cvnb.evaluate.saliency import METHODS, check_saliency, saliency_maps
    model, images, patch = shortcut_model(backbone, side)
    ones = np.ones(len(images), int)
    for method in METHODS:
        heat = saliency_maps(model, images, ones, 1 - ones, method)
        corner = heat[:, side - 2 * patch:, side - 2 * patch:].mean()
        assert heat.shape == (len(images), side, side) and corner > 1.3 * heat.mean(), method
    checked = check_saliency(model, images, ones, 1 - ones)
    assert set(checked.similarity) == set(METHODS) and "shuffled weights" in checked.words
    assert max(checked.similarity.values()) < 0.9
