"""One training of real digits in a process of its own: python train_job.py FOLDER '{"epochs": 2}' [BACKBONE]."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only
from sklearn.datasets import load_digits

from cvnb.models.inference import predict_logits
from cvnb.models.vision_model import VisionModel
from cvnb.models.weights import create_model
from cvnb.training.fit import fit
from cvnb.training.loaders import LabelledImages
from cvnb.training.options import FitOptions

CLASSES = [str(i) for i in range(10)]


def digits(
    side: int = 16,      # pixels: the 8 × 8 digits, each pixel as often as it fits
    n_train: int = 300,  # images
    n_val: int = 100,    # images
) -> tuple[LabelledImages, LabelledImages]:
    "Load scikit-learn's digits."
    data = load_digits()
    grey = (data.images * 255 / 16).astype(np.uint8).repeat(side // 8, 1).repeat(side // 8, 2)
    images, labels = np.repeat(grey[..., None], 3, -1), data.target.astype(np.int64)
    names = [f"digit_{i}.png" for i in range(len(labels))]
    cut = lambda a, b: LabelledImages(images[a:b], labels[a:b], names[a:b])
    return cut(0, n_train), cut(n_train, n_train + n_val)


def fresh(backbone: str = "resnet10t", side: int = 16) -> VisionModel:
    "Make a model, each time the same."
    torch.manual_seed(0)
    return create_model(backbone, CLASSES, side)


def main(folder: Path, options: dict, backbone: str) -> None:
    "Train, and leave weights, history and answers in the folder."
    side = 16
    train, val = digits(side)
    model = fresh(backbone, side)
    history = fit(model, train, val, FitOptions(**options), folder)
    if rank_zero_only.rank: folder = folder/"other"   # what another process has in the end
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder/"weights.pt")
    np.save(folder/"logits.npy", predict_logits(model, val.images))
    history.drop(columns="images_per_s").to_json(folder/"history.json", orient="records", double_precision=15)


if __name__ == "__main__":
    backbone = sys.argv[3] if len(sys.argv) > 3 else "resnet10t"
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), backbone)
