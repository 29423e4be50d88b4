"""BF16 and GPUs: what this machine lacks is said by name, what it has is used, and nothing falls back silently."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from bundles import IMAGES, make_bundle, write_graph

from cvnb.benchmark.table import list_candidates, list_left_out
from cvnb.cli.doctor import check_installation
from cvnb.core.errors import CvnbError, UsageError
from cvnb.export import runtimes
from cvnb.export.bundle import Bundle
from cvnb.export.runtimes import PROVIDERS, RUNTIMES, OnnxModel, select_providers

GPU = {"cuda": "onnx cuda fp32", "tensorrt": "onnx tensorrt fp32"}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    "A machine without a GPU."
    monkeypatch.setattr(runtimes, "lacks_gpu", lambda: "no NVIDIA GPU is visible here")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    "A machine with a GPU and an ONNX Runtime that lists its providers."
    monkeypatch.setattr(runtimes, "lacks_gpu", lambda: "")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*PROVIDERS.values()][::-1])


@pytest.mark.parametrize("device", GPU)
def test_gpu_is_refused_where_none_is(device: str, no_gpu, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path)
    with pytest.raises(CvnbError, match=f"cannot compute on {device}: no NVIDIA GPU is visible here.*onnxruntime-gpu"):
        Bundle.load(folder, device=device)
    assert GPU[device] not in {c.runtime.name for c in list_candidates(tmp_path)}
    assert not any(GPU[device] in name for name in list_left_out(tmp_path)), "nobody expects it here"
    row = next(row for row in check_installation() if row["part"] == f"runtime {GPU[device]}")
    assert not row["ok"] and row["found"].endswith("no NVIDIA GPU is visible here")
    assert row["remedy"].startswith("optional")


def test_onnxruntime_without_the_provider_is_named_beside_a_gpu(gpu, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(CvnbError, match="has no CUDAExecutionProvider; onnxruntime-gpu has it") as e:
        select_providers("cuda")
    assert "\n" not in str(e.value)
    assert "no TensorrtExecutionProvider" in list_left_out(tmp_path)["trained, onnx tensorrt fp32"]
    with pytest.raises(UsageError, match="device 'npu' does not exist. Use cpu or cuda or tensorrt"):
        select_providers("npu")


def test_providers_are_asked_in_order_and_in_full_precision(gpu) -> None:
    names = lambda device: [name for name, _ in select_providers(device)]
    assert names("cpu") == ["CPUExecutionProvider"]
    assert names("cuda") == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert names("tensorrt") == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert dict(select_providers("tensorrt"))["CUDAExecutionProvider"] == {"use_tf32": "0"}


@pytest.mark.parametrize("device", GPU)
def test_session_that_fell_back_to_the_cpu_is_refused(device: str, gpu, monkeypatch, tmp_path: Path) -> None:
    real = ort.InferenceSession
    asked = []

    def open_on_cpu(path: str, options: ort.SessionOptions, providers: list) -> ort.InferenceSession:
        asked.append([name for name, _ in providers])
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", open_on_cpu)
    file = write_graph(tmp_path/"model.onnx")
    with pytest.raises(CvnbError, match=f"cannot start {PROVIDERS[device]}, and would use CPUExecutionProvider"):
        RUNTIMES[GPU[device]].load(file, 1)
    assert asked[0][0] == PROVIDERS[device]
    assert OnnxModel(file)(IMAGES[0][None]).shape == (1, 3)


@pytest.fixture
def openvino_file(tmp_path: Path) -> Path:
    "A run with a model file of OpenVINO."
    pytest.importorskip("openvino")
    for name in "trained.onnx", "trained_openvino.onnx": write_graph(tmp_path/"export"/name)
    return tmp_path


def set_flags(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    info = runtimes.machine_info()
    monkeypatch.setattr(runtimes, "machine_info", lambda: info | dict(cpu=dict(model="x", flags=[*flags])))


def test_bf16_without_its_instructions_is_left_out_by_name(openvino_file: Path, monkeypatch) -> None:
    set_flags(monkeypatch, "avx2", "avx512f")
    reason = "this processor has no instructions for BF16"
    assert list_left_out(openvino_file)["trained, openvino bf16"] == reason
    names = {c.name for c in list_candidates(openvino_file)}
    assert "trained, openvino fp32" in names and "trained, openvino bf16" not in names
    row = next(row for row in check_installation() if row["part"] == "runtime openvino bf16")
    assert not row["ok"] and row["found"].endswith(reason)
    for flag in "avx512_bf16", "amx_bf16":
        set_flags(monkeypatch, flag)
        assert "trained, openvino bf16" in {c.name for c in list_candidates(openvino_file)}


def test_bf16_is_asked_of_openvino_and_fp32_is_not_changed(openvino_file: Path, monkeypatch) -> None:
    import openvino
    asked = []
    real = openvino.Core.compile_model

    def compile_model(self, model, device, config):
        asked.append(config["INFERENCE_PRECISION_HINT"])
        return real(self, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    expected = OnnxModel(openvino_file/"export/trained.onnx")(IMAGES[0][None])
    for name, tolerance in {"openvino fp32": 1e-5, "openvino bf16": 0.2}.items():
        found = RUNTIMES[name].load(RUNTIMES[name].model_path(openvino_file, "trained"), 1)(IMAGES[0][None])
        assert np.abs(found - expected).max() < tolerance
    assert asked == ["f32", "bf16"]
