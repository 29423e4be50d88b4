"""Backbones of many families at small image sizes; weights from files that are valid, wrapped, foreign or damaged."""
from __future__ import annotations

import pickle
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import create_conv2d
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cvnb.core.errors import CvnbError, UsageError
from cvnb.models.inference import extract_features, predict_logits, predict_proba, weights_sha256
from cvnb.models.small_maps import SmallMapConvMode
from cvnb.models.vision_model import (
    ModelSpec,
    Preprocess,
    VisionModel,
    build_model,
    check_image_size,
    patch_coverage_notes,
    task_of,
)
from cvnb.models.weights import create_model, load_model, save_model

CLASSES = ["a", "b", "c"]
SIZES = [32, 64]
FAST = ["resnet10t", "mobilenetv3_small_050", "efficientnet_b0", "regnetx_002", "ghostnet_050", "vit_tiny_patch16_224",
        "levit_128s", "lcnet_050"]
SLOW = ["resnet18", "convnext_atto", "densenet121", "vgg11", "deit_tiny_patch16_224", "mobilevit_xxs", "repvgg_a0",
        "mixer_s32_224", "mobileone_s0", "fastvit_t8", "edgenext_xx_small", "efficientvit_b0", "resmlp_12_224",
        "swin_tiny_patch4_window7_224", "pvt_v2_b0", "visformer_tiny", "coatnet_nano_rw_224", "maxvit_tiny_rw_224",
        "xcit_nano_12_p16_224", "dla34", "darknet53", "nf_resnet26", "convmixer_768_32"]
REFUSED = {"inception_v3": 299, "efficientformer_l1": 224, "crossvit_tiny_240": 240}


def make_batch(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def check_training(model: VisionModel, size: int) -> None:
    "Check that gradients reach the first layer, in two steps, because some heads start with zeros."
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits = model.train()(make_batch(size))
        F.cross_entropy(logits, torch.tensor([0, 2])).backward()
        optimizer.step()
    assert logits.shape == (2, 3) and torch.isfinite(logits).all()
    assert next(p.grad for p in model.net.parameters() if p.ndim == 4).abs().sum() > 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backbone", FAST + [pytest.param(b, marks=pytest.mark.slow) for b in SLOW])
def test_backbone_trains_on_small_images(backbone: str, size: int) -> None:
    model = create_model(backbone, CLASSES, size)
    check_training(model, size)
    assert extract_features(model, make_batch(size).numpy()).shape[0] == 2


@pytest.mark.parametrize("backbone", FAST[:2] + ["vit_tiny_patch16_224"] + [
    pytest.param(b, marks=pytest.mark.slow) for b in ("vgg11", "repvgg_a0", "densenet121", "dla34", "darknet53")])
def test_small_stem_keeps_resolution(backbone: str) -> None:
    cells = {}
    for stem in "full", "small":
        features = create_model(backbone, CLASSES, 64, stem).net.eval().forward_features(torch.zeros(1, 3, 64, 64))
        cells[stem] = features.shape[1] if features.ndim == 3 else features.shape[-1] * features.shape[-2]
    assert cells["small"] >= 3 * cells["full"]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", REFUSED)
def test_too_small_image_size_is_refused_with_the_right_one(backbone: str) -> None:
    with pytest.raises(UsageError, match=f"image_size={REFUSED[backbone]}"): create_model(backbone, CLASSES, 32)
    check_training(create_model(backbone, CLASSES, REFUSED[backbone]), REFUSED[backbone])


def test_unsupported_stem_is_refused() -> None:
    with pytest.raises(UsageError, match="no pooling"): create_model("mobilenetv3_small_050", CLASSES, 32, "half")
    with pytest.raises(UsageError, match="levit_128s.*train.stem=full"):
        create_model("levit_128s", CLASSES, 32, "small")
    assert create_model("levit_128s", CLASSES, 32).spec.stem == "full"     # auto takes a stem that works


def test_note_names_the_border_that_patches_leave_out() -> None:
    note, = patch_coverage_notes(create_model("vit_tiny_patch16_224", CLASSES, 100))
    assert "patches of 16 pixels and ignores the last 4 of 100 pixels: image_size=96 or 112 leaves no border" in note
    assert not patch_coverage_notes(create_model("vit_tiny_patch16_224", CLASSES, 96))
    assert not patch_coverage_notes(create_model("resnet10t", CLASSES, 33))


@pytest.mark.parametrize("backbone, size, stem, message", [
    ("resnet18.a1_in1kk", 64, "auto", "'resnet18.a1_in1kk' names weights that timm does not know.*resnet18.a1_in1k"),
    ("naflexvit_base_patch16_gap", 64, "small", "no first layer that could keep more.*train.stem=full")])
def test_impossible_backbone_is_refused(backbone: str, size: int, stem: str, message: str) -> None:
    with pytest.raises(UsageError, match=message): create_model(backbone, CLASSES, size, stem)


def test_resolution_schedule_changes_input_size() -> None:
    free, fixed = create_model("resnet10t", CLASSES, 32), create_model("vit_tiny_patch16_224", CLASSES, 32)
    check_image_size(free, 48)
    with pytest.raises(UsageError, match="48 pixels"): check_image_size(fixed, 48)
    free.preprocess.size = 48     # as a resolution schedule sets it
    sizes = []
    free.net.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    free.eval()(make_batch(32))
    assert sizes == [48] and free.spec.image_size == 32


# Weights


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("resnet10t", num_classes=9)


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: dict(state_dict=s), lambda s: dict(model={f"module.{k}": v for k, v in s.items()}, epoch=1),
    lambda s: {f"net.{k}": v for k, v in s.items()}, lambda s: {f"_orig_mod.model.net.{k}": v for k, v in s.items()}])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_weights_are_found_in_wrappers(net: nn.Module, tmp_path: Path, wrap, suffix: str) -> None:
    torch.save(wrap(net.state_dict()), tmp_path/f"w{suffix}")
    model = create_model("resnet10t", CLASSES, 64, weights=str(tmp_path/f"w{suffix}"))
    own = model.net.state_dict()
    assert all(torch.equal(own[k], v) for k, v in net.state_dict().items() if not k.startswith("fc."))


def test_weights_fit_with_another_stem(net: nn.Module, tmp_path: Path) -> None:
    save_file(net.state_dict(), tmp_path/"w.safetensors")
    model = create_model("resnet10t", CLASSES, 32, "small", str(tmp_path/"w.safetensors"))
    assert torch.equal(model.net.layer1[0].conv1.weight, net.layer1[0].conv1.weight)


@pytest.mark.parametrize("other", ["resnet14t", "resnet18", "mobilenetv3_small_050"])
def test_weights_of_another_architecture_are_refused(tmp_path: Path, other: str) -> None:
    save_file(timm.create_model(other).state_dict(), tmp_path/"w.safetensors")
    with pytest.raises(CvnbError, match=r"another architecture: \d+ of \d+ tensors fit"):
        create_model("resnet10t", CLASSES, 64, weights=str(tmp_path/"w.safetensors"))


def test_weights_of_a_deeper_network_are_refused(tmp_path: Path) -> None:
    "All of the smaller network's tensors would fit."
    save_file(timm.create_model("resnet34").state_dict(), tmp_path/"w.safetensors")
    with pytest.raises(CvnbError, match="have no place"):
        create_model("resnet18", CLASSES, 96, weights=str(tmp_path/"w.safetensors"))


class Trap:
    "Writes a file when unpickled."
    def __init__(self, path: Path): self.path = path

    def __reduce__(self): return Path.touch, (self.path,)


def test_pickle_does_not_run_code(tmp_path: Path) -> None:
    with open(tmp_path/"plain.pt", "wb") as f: pickle.dump(dict(state_dict=Trap(tmp_path/"ran")), f, protocol=2)
    torch.save(dict(state_dict=Trap(tmp_path/"ran")), tmp_path/"zipped.pt")
    for name in "plain.pt", "zipped.pt":
        with pytest.raises(CvnbError, match="Python objects"):
            create_model("resnet10t", CLASSES, 64, weights=str(tmp_path/name))
    assert not (tmp_path/"ran").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_truncated_file_is_refused(net: nn.Module, tmp_path: Path, name: str, keep: int) -> None:
    path = tmp_path/name
    if name.endswith(".pt"): torch.save(net.state_dict(), path)
    else: save_file(net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CvnbError, match=name): create_model("resnet10t", CLASSES, 64, weights=str(path))


def test_file_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save(dict(epoch=3), tmp_path/"w.pt")
    with pytest.raises(CvnbError, match="contains no weights"):
        create_model("resnet10t", CLASSES, 64, weights=str(tmp_path/"w.pt"))
    with pytest.raises(UsageError, match="neither a folder"):
        create_model("resnet10t", CLASSES, 64, weights=str(tmp_path/"w.onnx"))


def test_weights_of_a_run_set_stem_and_normalisation(tmp_path: Path) -> None:
    model = create_model("resnet10t", CLASSES, 32)
    assert model.spec.stem == "small"
    model.spec = replace(model.spec, mean=[.1, .2, .3])
    save_model(model, tmp_path)
    again = create_model("resnet10t", ["x", "y"], 48, weights=str(tmp_path))
    assert (again.spec.stem, again.spec.mean, again.spec.image_size) == ("small", [.1, .2, .3], 48)
    assert torch.equal(again.net.conv1[0].weight, load_model(tmp_path).net.conv1[0].weight)


def test_model_file_of_a_run_stands_for_its_folder(tmp_path: Path) -> None:
    model = create_model("resnet18", CLASSES, 32)
    model = VisionModel(replace(model.spec, mean=[0.3] * 3), model.net)
    save_model(model, tmp_path)
    again = create_model("resnet18", CLASSES, 48, weights=str(tmp_path/"model.safetensors"))
    assert again.spec.stem == model.spec.stem == "small" and again.spec.mean == [0.3] * 3
    assert weights_sha256(again.net) == weights_sha256(model.net)


def test_first_layer_of_another_shape_is_a_warning(tmp_path: Path) -> None:
    save_model(create_model("resnet18", CLASSES, 32), tmp_path)
    message = "conv1.*weight has another shape in the weights of .* and starts with random values"
    with pytest.warns(UserWarning, match=message): create_model("resnet18", CLASSES, 48, "full", weights=str(tmp_path))


def test_weights_of_another_image_size_are_refused_with_a_remedy(tmp_path: Path) -> None:
    "All tensors fit by name, one does not by shape: the message does not say that the architecture is another."
    save_file(timm.create_model("levit_128s", num_classes=3).state_dict(), tmp_path/"w.safetensors")
    message = "layers have other sizes: .*attention_biases.* Set the image_size for which they were trained"
    with pytest.raises(CvnbError, match=message):
        create_model("levit_128s", CLASSES, 64, weights=str(tmp_path/"w.safetensors"))


def test_encoder_without_classifier_is_refused() -> None:
    "timm's encoders are large; this network is small and returns feature maps as they do."
    model = create_model("test_resnet", CLASSES, 64)
    model.net.reset_classifier(0, "")
    message = r"test_resnet does not return the outputs of the task classification: " \
              r"it returns outputs of the shape \(\d+, \d, \d\) for images of 64 pixels"
    with pytest.raises(UsageError, match=message): check_image_size(model)


def test_head_of_a_run_is_loaded_for_the_same_classes_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_model(trained := create_model("test_efficientnet", CLASSES, 32), tmp_path)
    head = lambda model: model.net.get_classifier().weight
    same = create_model("test_efficientnet", CLASSES, 32, weights=str(tmp_path))
    others = create_model("test_efficientnet", ["a", "c", "d"], 32, weights=str(tmp_path))
    assert torch.equal(head(same), head(trained)) and not torch.equal(head(others), head(trained))
    assert torch.equal(others.net.conv_stem.weight, trained.net.conv_stem.weight)


def test_network_gets_red_first_minus_the_mean_over_the_deviation() -> None:
    spec = ModelSpec("resnet10t", ["a", "b"], 4, [0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    image = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    image[..., 0] = 255
    image[..., 2] = 51
    found = Preprocess(spec)(image)[0, :, 0, 0]
    assert found.tolist() == pytest.approx([(1 - 0.4) / 0.1, (0 - 0.5) / 0.2, (0.2 - 0.6) / 0.3], rel=1e-5)


def test_predictions_are_those_of_the_task() -> None:
    images = make_batch(32).numpy()
    for task in "classification", "multilabel", "regression":
        model = create_model("test_resnet", CLASSES, 32, task=task)
        expected = task_of(model.spec).predict(torch.from_numpy(predict_logits(model, images)))
        assert np.array_equal(predict_proba(model, images), expected)


def test_unreachable_hub_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs): raise ConnectionError("no route")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    monkeypatch.setattr("timm.models._hub.download_cached_file", refuse)
    for weights in "imagenet", "hf-hub:timm/resnet10t.c3_in1k":
        with pytest.raises(CvnbError, match="could not be fetched") as e:
            create_model("resnet10t", CLASSES, 64, weights=weights)
        assert "tf_efficientnet_lite0" in str(e.value)


def test_hub_weights_set_the_normalisation(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(net.state_dict(), tmp_path/"model.safetensors")
    own = '{"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}'
    (tmp_path/"config.json").write_text(f'{{"architecture": "resnet10t", "num_classes": 9, "pretrained_cfg": {own}}}')
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path/filename))
    model = create_model("resnet10t", CLASSES, 64, weights="hf-hub:someone/else")
    assert torch.equal(model.net.layer4[0].conv1.weight, net.layer4[0].conv1.weight)
    assert (model.spec.mean, model.spec.std) == ([0.1, 0.2, 0.3], [1, 2, 3])   # of the weights, not of the backbone
    black = model.preprocess(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))[0, :, 0, 0]
    assert torch.allclose(black, torch.tensor([-0.1, -0.1, -0.1]))


def test_batches_are_halved_when_gpu_memory_runs_out() -> None:
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
    sizes = []

    class Small(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 40: raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(len(x))
            return x.float().mean((1, 2))

    np.testing.assert_allclose(predict_logits(Small(), images), images.mean((1, 2)), rtol=1e-5)
    assert sizes == [32, 32, 32, 4]   # 256, halved until it fits


CONVOLUTIONS = {   # layer, height, width
    "2 × 2 under 5 × 5": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), 2, 2),
    "3 × 3 under 5 × 5": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8), 3, 3),
    "1 × 2 under 5 × 3 with a bias": (lambda: nn.Conv2d(8, 8, (5, 3), stride=(1, 2), padding=(2, 1), groups=8), 1, 2),
    "with a bias, map low only": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), 2, 9),
    "map narrow only, unequal padding": (lambda: nn.Conv2d(8, 8, (3, 5), padding=(0, 2), groups=8), 9, 3),
    "dilated": (lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), 2, 2),
    "strided": (lambda: nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8), 4, 4),
    "timm's with padding that depends on the map": (
        lambda: create_conv2d(8, 8, 5, stride=2, padding="same", depthwise=True), 4, 4),
    "torch's with named padding": (lambda: nn.Conv2d(8, 8, 5, padding="same", groups=8), 2, 2),
    "more outputs than inputs": (lambda: nn.Conv2d(8, 16, 5, padding=2, groups=8), 3, 3),
    "not depthwise": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=2), 2, 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_small_map_convolutions_equal_those_of_torch(name: str) -> None:
    torch.manual_seed(0)
    make, height, width = CONVOLUTIONS[name]
    layer = make()
    maps = torch.randn(3, 8, height, width, requires_grad=True)
    found = []
    for context in nullcontext(), SmallMapConvMode():
        with context: outputs = layer(maps)
        found.append([outputs, *torch.autograd.grad(outputs.square().sum(), [maps, *layer.parameters()])])
    for expected, fast in zip(*found): torch.testing.assert_close(fast, expected)


class ConvCounter(TorchFunctionMode):
    "Count the depthwise convolutions whose map is smaller than the kernel."
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv2d: self.n += args[1].shape[1] == 1 and args[0].shape[-1] < args[1].shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("processor, n", {"AVX2": 0, "AVX512": 7, "DEFAULT": 7}.items())
def test_small_map_convolutions_are_replaced_in_training_on_avx2(monkeypatch, processor, n):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    model = build_model(ModelSpec("tf_efficientnet_lite0", ["a", "b"], 64, [.5] * 3, [.25] * 3))
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    counts = {}
    for training in True, False:
        with ConvCounter() as counter: model.train(training)(images)
        counts[training] = counter.n
    assert counts == {True: n, False: 7}
