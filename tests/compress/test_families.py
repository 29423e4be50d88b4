"""A network of each of timm's families is pruned, reloaded from its files, exported to ONNX and run."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cvnb.compress.importance import IMPORTANCE, channel_scores
from cvnb.compress.prunable import CoupledChannels, check_prunable, prunable_parts, pruning_notes, trace_network
from cvnb.compress.prune import prune
from cvnb.core.errors import CvnbError, UsageError
from cvnb.export.onnx import export_onnx
from cvnb.export.runtimes import OnnxModel
from cvnb.models.cost import count_macs
from cvnb.models.inference import predict_logits, predict_proba
from cvnb.models.vision_model import VisionModel
from cvnb.models.weights import create_model, load_model, save_model

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
SMALL = dict(resnet="test_resnet", regnet="regnety_002", convnext="test_convnext", vit="test_vit")
LARGE = dict(resnet="resnet10t", resnext="resnext26ts", resnext50="resnext50_32x4d", regnet_x="regnetx_002",
             mobilenetv2="mobilenetv2_035", mobilenetv3="mobilenetv3_small_050", efficientnet="test_efficientnet",
             lite="tf_efficientnet_lite0", mnasnet="mnasnet_small", densenet="densenet121", vgg="vgg11_bn",
             ghostnet="ghostnet_050", convnext="convnext_atto", vit="vit_tiny_patch16_224",
             deit="deit_tiny_patch16_224", distilled="deit_tiny_distilled_patch16_224")


def make(backbone: str, size: int) -> VisionModel:
    "Make a network with random weights whose blocks have an effect."
    torch.manual_seed(0)
    model = create_model(backbone, list("abcd"), size, "full").eval()
    for m in model.modules():   # timm begins some residual branches with zeros, which would hide a wrong one
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, 0.5, 1.5)
    return model


def check_family(backbone: str, size: int, folder: Path) -> VisionModel:
    "Prune a network to half, reload it, export it and run it; return it."
    model = make(backbone, size)
    images = IMAGES[:, :size, :size]
    small = prune(model, 0.5, images, n_images=8)
    loaded = load_model(save_model(small, folder))
    assert count_macs(loaded) == count_macs(small) <= 0.5 * count_macs(model)
    assert np.array_equal(predict_logits(loaded, images), predict_logits(small, images))
    assert len(loaded.spec.classes) == predict_logits(loaded, images).shape[1] == 4
    convs = [m for m in loaded.modules() if isinstance(m, nn.Conv2d)]
    whole = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, conv in loaded.named_modules():
        if isinstance(conv, nn.Conv2d): assert conv.out_channels >= min(8, whole[name].out_channels), name
    assert convs or "vit" in backbone
    found = OnnxModel(export_onnx(loaded, folder/"model.onnx"), 1)(images)
    assert np.allclose(found, predict_proba(loaded, images), atol=1e-3)
    return loaded


@pytest.mark.parametrize("family", SMALL)
def test_pruned_network_is_reloaded_exported_and_run(family: str, tmp_path: Path) -> None:
    check_family(SMALL[family], 32, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", LARGE)
def test_pruned_network_of_a_larger_family_is_reloaded_exported_and_run(family: str, tmp_path: Path) -> None:
    check_family(LARGE[family], 64, tmp_path)


def test_every_layer_of_a_group_keeps_its_least_channels() -> None:
    "GhostNet's layers see half of the channels of their group: the least important half may not be all of one layer."
    model = make("ghostnet_050", 32)
    graph = trace_network(model)
    halves = [part for part in prunable_parts(model, graph) if part.channels_per_unit == 2]
    assert halves and all(len(part.shares()) > 1 for part in halves)
    part = max(halves, key=lambda part: part.n_units)
    shares = part.shares()
    assert all((share.counts == share.counts[0]).all() for share in shares), "units are alike"
    before = {share.layer: len(share.layer.weight) for share in shares}
    part.remove(torch.arange(part.n_units - 4))
    for share in shares:
        assert len(share.layer.weight) == before[share.layer] - int(share.counts[:-4].sum()) > 0
    model.net(torch.zeros(1, 3, 32, 32))


def test_heads_and_hidden_channels_of_a_transformer_are_removed_and_its_width_stays() -> None:
    model = make("test_vit", 32)
    small = prune(model, 0.4, IMAGES[:, :32, :32], n_images=8)
    heads = [block.attn.num_heads for block in small.net.blocks]
    assert sum(heads) < sum(block.attn.num_heads for block in model.net.blocks) and min(heads) >= 1
    assert all(block.attn.proj.in_features == block.attn.num_heads * block.attn.head_dim for block in small.net.blocks)
    assert any(block.mlp.fc1.out_features < model.net.blocks[0].mlp.fc1.out_features for block in small.net.blocks)
    assert small.net.embed_dim == small.net.blocks[0].mlp.fc2.out_features == model.net.embed_dim


def test_grouped_convolutions_lose_whole_groups() -> None:
    model = make("regnety_002", 32)
    small = prune(model, 0.4, IMAGES[:, :32, :32], n_images=8)
    before = dict(model.named_modules())
    grouped = {name: m for name, m in small.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert any(m.groups < before[name].groups for name, m in grouped.items())
    for name, m in grouped.items():
        assert m.weight.shape[1] == before[name].weight.shape[1] and m.in_channels == m.out_channels
        assert m.out_channels // m.groups == before[name].out_channels // before[name].groups


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_channel_without_effect_goes_first(importance: str) -> None:
    "A planted channel with no weights has the lowest score of its part by every measure."
    model = make("resnet10t", 32)
    images = IMAGES[:, :32, :32]
    block = model.net.layer2[0]
    with torch.no_grad():
        for weight in (block.conv1.weight, block.bn1.weight, block.bn1.bias): weight[5] = 0
        block.conv2.weight[:, 5] = 0
    part = next(part for part in prunable_parts(model, trace_network(model)) if isinstance(part, CoupledChannels)
                and block.conv1 in [share.layer for share in part.shares()])
    scores = channel_scores(model, images, np.arange(8) % 4, importance)
    assert int(part.importance(scores).argmin()) == 5
    small = prune(model, 0.8, images, n_images=8, importance=importance, labels=np.arange(8) % 4)
    assert count_macs(small) <= 0.8 * count_macs(model)


def test_unknown_importance_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="hessian"): prune(make("resnet10t", 32), 0.5, IMAGES, importance="hessan")


@pytest.mark.parametrize("backbone, size, why", [
    ("convnextv2_atto", 32, "all its channels pass through layers that stay whole"),
    ("test_nfnet", 64, "the smaller network does not run"),
])
def test_network_that_cannot_be_pruned_is_refused_with_the_reason(backbone: str, size: int, why: str) -> None:
    model = make(backbone, size)
    for refused in lambda: check_prunable(model), lambda: prune(model, 0.5, IMAGES[:, :size, :size], n_images=8):
        with pytest.raises(CvnbError, match=f"{backbone} cannot be pruned: {why}") as error: refused()
        assert "compress.macs_fraction=1" in str(error.value) and "\n" not in str(error.value)


def test_network_that_cannot_be_traced_is_refused_with_the_reason() -> None:
    model = make("resnet10t", 32)

    def forward(x: torch.Tensor) -> None: raise RuntimeError("no such path\nat line 3")

    model.net.layer1.forward = forward
    with pytest.raises(CvnbError, match="it cannot be traced [(]no such path[)]"): trace_network(model)


def test_networks_that_will_be_refused_are_named_before_they_are_trained():
    torch.manual_seed(0)
    classes = ["a", "b"]
    assert pruning_notes(create_model("resnet10t", classes, 32)) == []
    [note] = pruning_notes(create_model("convnextv2_atto", classes, 32))
    assert "the compress stage will refuse this network" in note and "compress.macs_fraction=1" in note
    other_task = create_model("resnet10t", ["length"], 32, task="regression")
    assert pruning_notes(other_task) == [], "it refuses the task itself"
