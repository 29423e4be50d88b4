"""What follows when the model fails on an image: an error, the bundle before, or no answer, each named."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import bundles
import numpy as np
import pytest
from servers import SHIP, TOKEN, Server, cvnb, encode, serving

from cvnb.export.bundle import write_bundle
from cvnb.models.vision_model import ModelSpec
from cvnb.serve.request_log import read_request_log

GOOD = np.full((8, 8, 3), 60, np.uint8)
BAD = np.full((8, 8, 3), 250, np.uint8)   # the model fails on images this bright


def write_failing_bundle(folder: Path) -> Path:
    "Write a bundle whose model looks up the brightest colour in a table that ends at 200."
    make = bundles.helper.make_node

    def end() -> list:
        return [make("ReduceMax", ["means"], ["brightest"], keepdims=0), make("Cast", ["brightest"], ["place"], to=7),
                make("Gather", ["table", "place"], ["nothing"]), make("Add", ["logits", "nothing"], ["found"]),
                make("Softmax", ["found"], ["probabilities"], axis=1)]
    for name in "trained.onnx", "trained_int8.onnx":
        bundles.write_graph(folder/"export"/name, end, weights=dict(table=np.zeros(201, np.float32)))
    spec = ModelSpec("mean_colour", bundles.LABELS, 6, [0.5] * 3, [0.5] * 3)
    details = dict(run="pets", shipped=dict(model="trained"), metrics={}, verdict=SHIP)
    return write_bundle(folder/"bundle", folder, "trained", spec, bundles.IMAGES, details)


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle whose model fails on bright images."
    return write_failing_bundle(tmp_path_factory.mktemp("failing")/"run")


def request_of(image: np.ndarray, **extra: object) -> dict:
    return dict(inputs=[dict(name="images", datatype="UINT8", shape=[1, *image.shape], data=image.ravel().tolist())],
                **extra)


@pytest.mark.parametrize("options", [(), ("--fallback", "previous")])   # there is none before
def test_without_a_fallback_a_failure_is_an_error(options: tuple[str, ...], failing: Path, tmp_path: Path) -> None:
    with serving(tmp_path/"log", failing, *options) as server:
        assert server.ask("/predict", encode(GOOD)).status == 200
        answer = server.ask("/predict", encode(BAD))
        assert answer.status == 500 and "the model failed" in answer.json["error"] and "fallback" not in answer.json
        assert server.metric('cvnb_errors_total{kind="model"}') == 1
        assert server.metric('cvnb_fallbacks_total{fallback="previous"}') == 0


def ask_grpc(port: int) -> object:
    import tritonclient.grpc as client
    given = client.InferInput("images", [1, *BAD.shape], "UINT8")
    given.set_data_from_numpy(BAD[None])
    with client.InferenceServerClient(f"127.0.0.1:{port}") as asking:
        return asking.infer("pets", [given]).get_response()


def test_no_answer_is_named(failing: Path, tmp_path: Path) -> None:
    arguments = failing, "--fallback", "no-answer", "--log", tmp_path/"requests", "--grpc-port", 0
    with serving(tmp_path/"log", *arguments) as server:
        good = server.ask("/predict", encode(GOOD)).json
        assert good["label"] in bundles.LABELS and "fallback" not in good
        bad = server.ask("/predict", encode(BAD))
        assert bad.status == 200 and bad.json["fallback"] == "no answer"
        assert [bad.json[key] for key in ("label", "confidence", "probabilities")] == [None] * 3
        infer = server.infer(request_of(BAD, id="seven"))
        assert infer.status == 200 and infer.json["outputs"] == [] and infer.json["id"] == "seven"
        assert infer.json["parameters"] == dict(fallback="no answer")
        assert "parameters" not in server.infer(request_of(GOOD)).json
        grpc = ask_grpc(int(re.search(r"gRPC: \S+ port (\d+)", server.text)[1]))
        assert grpc.parameters["fallback"].string_param == "no answer" and not grpc.outputs
        assert server.metric('cvnb_fallbacks_total{fallback="no answer"}') == 3
        version = f'model="pets",version="{server.version}"'
        assert server.metric(f"cvnb_prediction_confidence_ratio_count{{{version}}}") == 2   # the good ones
        assert "fallback: no answer" in server.text
        server.stop()
    logged = [(r.get("fallback"), r["prediction"] is None, r["probabilities"] is None)
              for r in read_request_log(tmp_path/"requests")]
    nothing = ("no answer", True, True)
    assert logged == [(None, False, False), nothing, nothing, (None, False, False), nothing]


def swap_in(server: Server, folder: Path, bundle: Path) -> None:
    shutil.copytree(bundle, folder/"next")
    assert server.ask("/bundle", b'{"bundle": "next"}', "PUT").status == 200


def test_bundle_before_answers_and_is_named(served_bundle: Path, failing: Path, tmp_path: Path) -> None:
    (tmp_path/"bundles").mkdir()
    arguments = served_bundle, "--fallback", "previous", "--bundles", tmp_path/"bundles"
    with serving(tmp_path/"log", *arguments, token=TOKEN) as server:
        expected = server.ask("/predict", encode(BAD)).json
        swap_in(server, tmp_path/"bundles", failing)
        good = server.ask("/predict", encode(GOOD)).json
        assert good["version"] != server.version and "fallback" not in good
        bad = server.ask("/predict", encode(BAD)).json
        assert (bad["fallback"], bad["version"], bad["probabilities"]) == (
            "previous", server.version, expected["probabilities"])
        infer = server.infer(request_of(BAD)).json
        assert (infer["parameters"], infer["model_version"]) == (dict(fallback="previous"), server.version)
        pinned = f"/v2/models/pets/versions/{good['version']}/infer"   # this client wants no other version
        assert server.ask(pinned, json.dumps(request_of(BAD)).encode()).status == 500
        assert server.metric('cvnb_fallbacks_total{fallback="previous"}') == 2
        broken = server.ask("/predict", b"no image")
        assert broken.status == 415   # what a client does wrong has no fallback


def test_first_bundle_answers_where_the_second_fails(served_bundle: Path, failing: Path, tmp_path: Path) -> None:
    arguments = served_bundle, "--split", 1, failing, "--fallback", "previous"
    with serving(tmp_path/"log", *arguments) as server:
        assert server.ask("/predict", encode(GOOD)).json["version"] != server.version
        bad = server.ask("/predict", encode(BAD)).json
        assert (bad["fallback"], bad["version"]) == ("current", server.version)


def test_unknown_fallback_is_refused(served_bundle: Path) -> None:
    done = cvnb("serve", served_bundle, "--fallback", "none")
    assert done.returncode == 2 and "--fallback 'none'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_page_says_that_there_is_no_answer(failing: Path, tmp_path: Path, playwright_page: object) -> None:
    (tmp_path/"bright.png").write_bytes(encode(BAD))
    with serving(tmp_path/"log", failing, "--fallback", "no-answer") as server:
        playwright_page.goto(server.address)
        playwright_page.set_input_files("#file", tmp_path/"bright.png")
        playwright_page.wait_for_selector("#result .name")
        assert playwright_page.inner_text("#result .name") == "no answer"
        assert "fallback: no answer" in playwright_page.inner_text("#result .wrong")
