"""The Open Inference Protocol over HTTP: what clients get, by our own bytes and by a client of others."""
from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from servers import Server, encode

from cvnb.export.bundle import Bundle
from cvnb.serve.served_model import served_digest


@pytest.fixture(scope="module")
def expected(served_bundle: Path, photos: list[np.ndarray]) -> np.ndarray:
    "What the bundle itself predicts."
    return np.array([[*p["probabilities"].values()] for p in Bundle.load(served_bundle).predict(photos)], np.float32)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    "Two images of one size."
    rng = np.random.default_rng(1)
    return [rng.integers(0, (60, 120, 250), (20, 30, 3)).astype(np.uint8) for _ in range(2)]


def tensor(photos: list[np.ndarray], **more: object) -> dict:
    "Describe raw images."
    return dict(name="images", datatype="UINT8", shape=[len(photos), *photos[0].shape]) | more


def read_binary(answer: object) -> dict[str, object]:
    "Read outputs behind the JSON."
    size = int(answer.headers["inference-header-content-length"])
    rest = answer.body[size:]
    found = {}
    for output in json.loads(answer.body[:size])["outputs"]:
        n = output["parameters"]["binary_data_size"]
        raw, rest = rest[:n], rest[n:]
        if output["datatype"] == "FP32": found[output["name"]] = np.frombuffer(raw, "<f4").reshape(output["shape"])
        else: found[output["name"]] = raw
    assert not rest
    return found


def test_health_and_metadata(server: Server, served_bundle: Path) -> None:
    assert server.ask("/v2/health/live").json == {"live": True} and server.ask("/v2/health/ready").json["ready"] is True
    about = server.ask("/v2").json
    assert about["name"] == "cvnb" and about["extensions"] == ["binary_tensor_data"]
    assert server.model == "pets" and server.version == served_digest(served_bundle)[:12]
    for path in "/v2/models/pets", f"/v2/models/pets/versions/{server.version}":
        assert server.ask(f"{path}/ready").json["ready"] is True
        model = server.ask(path).json
        assert model["inputs"] == [dict(name="images", datatype="UINT8", shape=[-1, -1, -1, 3])]
        assert model["outputs"][0] == dict(name="probabilities", datatype="FP32", shape=[-1, 3])
        assert model["parameters"]["labels"] == ["cat", "dog", "owl"] and model["versions"] == [server.version]


@pytest.mark.parametrize("nested", [True, False])
def test_json_tensor_is_predicted_as_by_the_bundle(
    server: Server, photos: list[np.ndarray], expected: np.ndarray, nested: bool,
) -> None:
    data = np.stack(photos)
    data = data.tolist() if nested else data.ravel().tolist()
    answer = server.infer(dict(id="seven", inputs=[tensor(photos, data=data)]))
    assert answer.status == 200, answer.body
    found = answer.json
    assert (found["id"], found["model_name"], found["model_version"]) == ("seven", "pets", server.version)
    probabilities, label = found["outputs"]
    assert probabilities["shape"] == [2, 3] and label["datatype"] == "BYTES"
    assert np.abs(np.array(probabilities["data"]).reshape(2, 3) - expected).max() < 1e-6
    assert label["data"] == [["cat", "dog", "owl"][i] for i in expected.argmax(1)]


def test_binary_tensors_both_ways(server: Server, photos: list[np.ndarray], expected: np.ndarray) -> None:
    raw = np.stack(photos).tobytes()
    given = tensor(photos, parameters=dict(binary_data_size=len(raw)))
    head = json.dumps(dict(inputs=[given], parameters=dict(binary_data_output=True))).encode()
    answer = server.ask("/v2/models/pets/infer", head + raw, Inference_Header_Content_Length=str(len(head)))
    assert answer.headers["content-type"] == "application/octet-stream"
    found = read_binary(answer)
    assert np.abs(found["probabilities"] - expected).max() < 1e-6
    names = [["cat", "dog", "owl"][i].encode() for i in expected.argmax(1)]
    assert found["label"] == b"".join(struct.pack("<I", len(n)) + n for n in names)


def test_outputs_are_chosen_one_by_one(server: Server, photos: list[np.ndarray]) -> None:
    wanted = [dict(name="label"), dict(name="probabilities", parameters=dict(binary_data=True))]
    data = np.stack(photos).ravel().tolist()
    answer = server.infer(dict(inputs=[tensor(photos, data=data)], outputs=wanted))
    size = int(answer.headers["inference-header-content-length"])
    first, second = json.loads(answer.body[:size])["outputs"]
    assert first["name"] == "label" and len(first["data"]) == 2 and "data" not in second
    assert len(answer.body) - size == second["parameters"]["binary_data_size"] == 24


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("binary", [True, False])
def test_encoded_images_of_any_size(
    server: Server, served_bundle: Path, tmp_path: Path, kind: str, binary: bool,
) -> None:
    rng = np.random.default_rng(2)
    contents = []
    for i in range(3):
        contents.append(encode(rng.integers(0, 200, (9 + i, 40 - i, 3)).astype(np.uint8), kind))
        (tmp_path/f"{i}.{kind.lower()}").write_bytes(contents[-1])
    predicted = Bundle.load(served_bundle).predict(sorted(tmp_path.iterdir()))
    given = dict(name="images", datatype="BYTES", shape=[3])
    if binary:
        raw = b"".join(struct.pack("<I", len(c)) + c for c in contents)
        head = json.dumps(dict(inputs=[given | dict(parameters=dict(binary_data_size=len(raw)))])).encode()
        answer = server.ask("/v2/models/pets/infer", head + raw, Inference_Header_Content_Length=str(len(head)))
    else: answer = server.infer(dict(inputs=[given | dict(data=[base64.b64encode(c).decode() for c in contents])]))
    assert answer.status == 200, answer.body
    found = np.array(answer.json["outputs"][0]["data"]).reshape(3, 3)
    assert np.abs(found - [[*p["probabilities"].values()] for p in predicted]).max() < 1e-6
    assert answer.json["outputs"][1]["data"] == [p["label"] for p in predicted]


def test_tritonclient_agrees(server: Server, photos: list[np.ndarray], expected: np.ndarray) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("pets", server.version)
    assert not client.is_model_ready("dogs")
    assert client.get_server_metadata()["name"] == "cvnb"
    assert client.get_model_metadata("pets")["outputs"][0]["name"] == "probabilities"
    raw = triton.InferInput("images", [2, 20, 30, 3], "UINT8")
    texts = triton.InferInput("images", [2], "BYTES")
    texts.set_data_from_numpy(np.array([encode(p) for p in photos], object))
    for binary in True, False:
        raw.set_data_from_numpy(np.stack(photos), binary_data=binary)
        wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("probabilities", "label")]
        for given in raw, texts:
            found = client.infer("pets", [given], outputs=wanted, request_id="9")
            assert np.abs(found.as_numpy("probabilities") - expected).max() < 1e-6
            assert found.get_response()["id"] == "9" and len(found.as_numpy("label")) == 2
    with pytest.raises(triton.InferenceServerException, match="no output 'nothing'"):
        client.infer("pets", [raw], outputs=[triton.InferRequestedOutput("nothing")])
    client.close()


SMALL = dict(name="images", datatype="UINT8", shape=[1, 1, 2, 3], data=[0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("change, status, said", [
    (dict(inputs=[]), 400, "`inputs`"),
    (dict(inputs=SMALL), 400, "`inputs`"),
    (dict(inputs=[SMALL, SMALL]), 400, "the model has one: images"),
    (dict(inputs=[SMALL | dict(name="picture")]), 400, "picture"),
    (dict(inputs=[SMALL | dict(datatype="FP32")]), 400, "FP32"),
    (dict(inputs=[SMALL | dict(datatype="BYTES", shape=[6])]), 400, "Base64"),
    (dict(inputs=[SMALL | dict(datatype="BYTES", shape=[1], data=["AAAA"])]), 415, "JPEG, PNG, WEBP"),
    (dict(inputs=[SMALL | dict(datatype="BYTES", shape=[1], data=["AAAA"], parameters=dict(content_type="x"))]), 400,
     "content type"),
    (dict(inputs=[SMALL | dict(shape=[1, 1, 3, 3])]), 400, "shape"),
    (dict(inputs=[SMALL | dict(shape=[1, 2, 3])]), 400, "shape"),
    (dict(inputs=[SMALL | dict(shape=[1, -1, 2, 3])]), 400, "shape"),
    (dict(inputs=[SMALL | dict(shape=[0, 1, 2, 3], data=[])]), 400, "no image"),
    (dict(inputs=[SMALL | dict(shape=[2**30, 2**30, 2, 3])]), 413, "images are more than"),
    (dict(inputs=[SMALL | dict(shape=[2, 2**30, 2**30, 3])]), 413, "megapixels"),
    (dict(inputs=[SMALL | dict(data=[0, 1, 2, 3, 4, 256])]), 400, "0 … 255"),
    (dict(inputs=[SMALL | dict(data=[0, 1, 2, 3, 4, True])]), 400, "whole numbers"),
    (dict(inputs=[SMALL | dict(data=[0, 1, 2, 3, 4, 0.5])]), 400, "whole numbers"),
    (dict(inputs=[SMALL | dict(data=None)]), 400, "data"),
    (dict(inputs=[SMALL | dict(parameters=dict(binary_data_size=6))]), 400, "both"),
    (dict(id=7), 400, "`id`"),
    (dict(id="x" * 300), 400, "`id`"),
    (dict(outputs=[dict(name="logits")]), 400, "no output 'logits'"),
    (dict(outputs=[dict(name="label"), dict(name="label")]), 400, "twice"),
    (dict(outputs=[dict(name="label", parameters=dict(binary_data="yes"))]), 400, "true or false"),
    (dict(parameters=[]), 400, "`parameters`"),
])
def test_wrong_request_is_refused_with_its_reason(server: Server, change: dict, status: int, said: str) -> None:
    answer = server.infer(dict(inputs=[SMALL]) | change)
    assert answer.status == status and said in answer.json["error"], answer.body
    assert server.infer(dict(inputs=[SMALL])).status == 200


@pytest.mark.parametrize("body, header, said", [
    (b"", None, "JSON"), (b"{", None, "JSON"), (b"[]", None, "object"), (b"\xff\xfe", None, "JSON"),
    (b"[" * 50_000, None, "nested"), (b'{"inputs": [{"name": NaN}]}', None, "JSON"), (b"{}", "-1", "Length"),
    (b"{}", "3", "Length"), (b"{}", "x", "Length"), (b"{}\0\0", "2", "inputs")])
def test_body_that_is_no_request_is_refused(server: Server, body: bytes, header: str | None, said: str) -> None:
    headers = dict(Inference_Header_Content_Length=header) if header else {}
    answer = server.ask("/v2/models/pets/infer", body, "POST", **headers)
    assert answer.status == 400 and said in answer.json["error"], answer.body


@pytest.mark.parametrize("method, path, status", [
    ("POST", "/v2/models/dogs/infer", 404), ("POST", "/v2/models/pets/versions/9/infer", 404),
    ("GET", "/v2/models", 404),
    ("GET", "/v2/models/pets/infer", 405), ("POST", "/v2", 405), ("GET", "/v3", 404), ("GET", "/v2/", 404),
    ("GET", "/v2/models/dogs/ready", 404), ("GET", "/%00", 404), ("DELETE", "/predict", 405)])
def test_other_addresses_and_methods_are_refused(server: Server, method: str, path: str, status: int) -> None:
    answer = server.ask(path, b"{}" if method == "POST" else None, method)
    assert answer.status == status and "error" in answer.json
    assert (status == 405) == ("allow" in answer.headers)
