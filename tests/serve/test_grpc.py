"""The Open Inference Protocol over gRPC, asked by a client of others."""
from __future__ import annotations

import random
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from servers import TOKEN, Server, cvnb, encode, mutate_bytes, serving, write_served_bundle
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cvnb.export.bundle import Bundle


def grpc_port(server: Server) -> int:
    "Read the port from what the server prints."
    return int(re.search(r"^gRPC: \S+ port (\d+)$", server.text, re.M)[1])


@pytest.fixture(scope="module")
def both(served_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    "A server with HTTP and gRPC."
    with serving(tmp_path_factory.mktemp("grpc")/"log", served_bundle, "--grpc-port", 0) as server: yield server


@pytest.fixture
def client(both: Server) -> Iterator[triton.InferenceServerClient]:
    "Triton's client."
    with triton.InferenceServerClient(f"127.0.0.1:{grpc_port(both)}") as found: yield found


def infer(client: triton.InferenceServerClient, tensor: triton.InferInput, **options: object) -> triton.InferResult:
    "Ask for an inference."
    return client.infer("pets", [tensor], client_timeout=30, **options)


def tensor(values: np.ndarray, kind: str) -> triton.InferInput:
    "Make an input."
    found = triton.InferInput("images", list(values.shape), kind)
    found.set_data_from_numpy(values)
    return found


def test_health_and_metadata(client: triton.InferenceServerClient, both: Server) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("pets", both.version)
    assert client.get_server_metadata().name == "cvnb"
    about = client.get_model_metadata("pets")
    assert [tuple(i.shape) for i in about.inputs] == [(-1, -1, -1, 3)] and about.versions == [both.version]
    assert [o.name for o in about.outputs] == ["probabilities", "label"]


def test_images_are_predicted_as_by_the_bundle(client: triton.InferenceServerClient, served_bundle: Path,
                                               photo: np.ndarray) -> None:
    photos = np.stack([photo, photo[::-1] // 2])
    predicted = Bundle.load(served_bundle).predict([*photos])
    expected = np.array([[*p["probabilities"].values()] for p in predicted], np.float32)
    texts = np.array([encode(p) for p in photos], object)
    for given in tensor(photos, "UINT8"), tensor(texts, "BYTES"):
        found = infer(client, given, request_id="seven")
        assert np.abs(found.as_numpy("probabilities") - expected).max() < 1e-6 and found.get_response().id == "seven"
        assert [name.decode() for name in found.as_numpy("label")] == [p["label"] for p in predicted]
    only = infer(client, tensor(photos, "UINT8"), outputs=[triton.InferRequestedOutput("label")])
    assert only.as_numpy("probabilities") is None


def test_typed_contents_are_answered_in_kind(both: Server, photo: np.ndarray) -> None:
    request = service_pb2.ModelInferRequest(model_name="pets")
    given = request.inputs.add(name="images", datatype="UINT8", shape=[1, *photo.shape])
    given.contents.uint_contents.extend(photo.ravel().tolist())
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port(both)}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(request)
        assert not answer.raw_output_contents and answer.outputs[1].contents.bytes_contents == [b"owl"]
        assert sum(answer.outputs[0].contents.fp32_contents) == pytest.approx(1)
        given.contents.uint_contents[0] = 256
        with pytest.raises(grpc.RpcError) as refused: stub.ModelInfer(request)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "0 … 255" in refused.value.details()
        request.raw_input_contents.append(b"")
        with pytest.raises(grpc.RpcError, match="both"): stub.ModelInfer(request)


@pytest.mark.parametrize("change, code, said", [
    (dict(model="dogs"), "NOT_FOUND", "dogs"), (dict(model_version="9"), "NOT_FOUND", "'9'"),
    (dict(kind="FP32"), "INVALID_ARGUMENT", "FP32"), (dict(shape=(1, 2, 3)), "INVALID_ARGUMENT", "shape"),
    (dict(outputs=["logits"]), "INVALID_ARGUMENT", "logits"), (dict(request_id="x" * 999), "INVALID_ARGUMENT", "`id`"),
    (dict(texts=[b"no image"]), "INVALID_ARGUMENT", "JPEG, PNG, WEBP")])
def test_wrong_request_is_refused_with_its_code(
    client: triton.InferenceServerClient, change: dict, code: str, said: str,
) -> None:
    change = dict(change)
    texts = change.pop("texts", None)
    kind = "BYTES" if texts else change.pop("kind", "UINT8")
    values = np.array(texts, object) if texts else np.zeros(change.pop("shape", (1, 2, 2, 3)),
                                                            np.float32 if kind == "FP32" else np.uint8)
    options = change | dict(outputs=[triton.InferRequestedOutput(n) for n in change.get("outputs", ["label"])])
    with pytest.raises(triton.InferenceServerException, match=re.escape(said)) as refused:
        client.infer(options.pop("model", "pets"), [tensor(values, kind)], client_timeout=30, **options)
    assert refused.value.status() == f"StatusCode.{code}"
    assert client.is_server_live()


def test_random_messages_get_defined_answers(both: Server, photo: np.ndarray) -> None:
    r = random.Random(0)
    request = service_pb2.ModelInferRequest(model_name="pets", id="a", raw_input_contents=[encode(photo)[:200]])
    request.inputs.add(name="images", datatype="BYTES", shape=[1]).parameters["a"].string_param = "b"
    request.outputs.add(name="label")
    raw = service_pb2.ModelInferRequest(model_name="pets", raw_input_contents=[photo.tobytes()])
    raw.inputs.add(name="images", datatype="UINT8", shape=[1, *photo.shape])
    codes: Counter = Counter()
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port(both)}") as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(300):
            try: codes["OK"] += bool(ask(mutate_bytes(r.choice([request, raw]).SerializeToString(), r), timeout=20))
            except grpc.RpcError as e: codes[e.code().name] += 1
    assert {*codes} <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} and len(codes) == 3, codes
    assert both.process.poll() is None and "Traceback" not in both.text


def test_calls_are_counted(client: triton.InferenceServerClient, both: Server, photo: np.ndarray) -> None:
    before = both.metric('cvnb_requests_total{code="OK",endpoint="grpc_ModelInfer"}')
    infer(client, tensor(photo[None], "UINT8"))
    assert both.metric('cvnb_requests_total{code="OK",endpoint="grpc_ModelInfer"}') == before + 1
    assert both.metric("cvnb_requests_in_memory_bytes") == 0 and "Traceback" not in both.text


def test_token_and_end(served_bundle: Path, photo: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path/"requests"
    with serving(tmp_path/"log", served_bundle, "--grpc-port", 0, "--log", folder, token=TOKEN) as server, \
            triton.InferenceServerClient(f"127.0.0.1:{grpc_port(server)}") as client, ThreadPoolExecutor(4) as pool:
        given = tensor(photo[None], "UINT8")
        assert client.is_server_live()
        for headers in {}, dict(authorization="Bearer wrong"):
            with pytest.raises(triton.InferenceServerException) as refused: infer(client, given, headers=headers)
            assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
        known = dict(authorization=f"Bearer {TOKEN}")
        asked = [pool.submit(infer, client, given, headers=known) for _ in range(20)]
        for a in asked: assert a.result().as_numpy("label")[0] == b"owl"
        assert server.stop(signal.SIGTERM) == 0 and "Traceback" not in server.text
    from cvnb.serve.request_log import read_request_log
    assert len([*read_request_log(folder)]) == 20


def test_grpc_speaks_tls(served_bundle: Path, certificates: Path, tmp_path: Path) -> None:
    files = "--tls-certificate", certificates/"good.pem", "--tls-key", certificates/"good.key"
    trusted = grpc.ssl_channel_credentials((certificates/"good.pem").read_bytes())
    with serving(tmp_path/"log", served_bundle, "--grpc-port", 0, *files) as server:
        place = f"localhost:{grpc_port(server)}"
        for channel, live in (grpc.secure_channel(place, trusted), True), (grpc.insecure_channel(place), False):
            with channel:
                ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive
                if live: assert ask(service_pb2.ServerLiveRequest(), timeout=20).live
                else:
                    with pytest.raises(grpc.RpcError): ask(service_pb2.ServerLiveRequest(), timeout=20)


def test_port_that_is_taken_and_missing_part_are_named(both: Server, served_bundle: Path, tmp_path: Path) -> None:
    done = cvnb("serve", served_bundle, "--port", 0, "--grpc-port", grpc_port(both))
    assert done.returncode == 1 and "--grpc-port" in done.stderr and "Traceback" not in done.stderr, done.stderr
    (tmp_path/"grpc.py").write_text("raise ModuleNotFoundError('no grpc', name='grpc')")
    done = cvnb("serve", served_bundle, "--port", 0, "--grpc-port", 0, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "cvnb[grpc]" in done.stderr and "Traceback" not in done.stderr


def test_second_version_of_a_split_is_listed_over_both_protocols(served_bundle: Path, tmp_path: Path) -> None:
    other = write_served_bundle(tmp_path/"other", weight=0.02)
    with serving(tmp_path/"log", served_bundle, "--split", 0.5, other, "--grpc-port", 0) as server, \
            triton.InferenceServerClient(f"127.0.0.1:{grpc_port(server)}") as client:
        versions = server.ask("/v2/models/pets").json["versions"]
        assert len(versions) == 2 and [*client.get_model_metadata("pets").versions] == versions
        missing = server.ask("/v2/models/pets/versions/zzz")
        assert missing.status == 404 and all(version in missing.json["error"] for version in versions)


def test_taken_port_is_named_in_one_line(served_bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cvnb("serve", served_bundle, "--port", 0, "--grpc-port", port)
    assert done.returncode == 1 and f"port {port} of 127.0.0.1 cannot be used" in done.stderr
    assert "--grpc-port 0" in done.stderr and len(done.stderr.splitlines()) == 1
