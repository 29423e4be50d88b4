"""A second bundle beside the one that answers."""
from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from servers import SHIP, cvnb, encode, serving, write_served_bundle

from cvnb.serve.challenger import choose_split
from cvnb.serve.request_log import read_request_log


@pytest.fixture(scope="module")
def milder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle that prefers the same classes, less decidedly."
    return write_served_bundle(tmp_path_factory.mktemp("milder")/"run", SHIP, weight=0.02)


@pytest.fixture(scope="module")
def contrary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle that prefers other classes."
    return write_served_bundle(tmp_path_factory.mktemp("contrary")/"run", SHIP, weight=-0.25)


@pytest.mark.parametrize("other, result", [("milder", "same"), ("contrary", "other")])
def test_shadow_is_compared_and_answers_nobody(
    served_bundle: Path, photo: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest, other: str, result: str,
) -> None:
    folder = tmp_path/"requests"
    arguments = "--shadow", request.getfixturevalue(other), "--log", folder
    with serving(tmp_path/"log", served_bundle, *arguments) as server:
        answers = [server.ask("/predict", encode(photo), X_Request_Id=f"r{i}") for i in range(6)]
        assert {a.json["version"] for a in answers} == {server.version}
        shadow = server.ask("/model").json["shadow"]
        deadline = time.monotonic() + 20
        while server.metric(f'cvnb_shadow_images_total{{result="{result}"}}') < 6: assert time.monotonic() < deadline
        total = server.metric("cvnb_shadow_difference_ratio_sum")
        assert server.metric("cvnb_shadow_difference_ratio_count") == 6
        assert server.metric(f'cvnb_predictions_total{{label="owl",model="pets",version="{server.version}"}}') == 6
        assert server.stop() == 0
    records = [*read_request_log(folder)]
    ours = {r["id"]: r for r in records if "role" not in r}
    theirs = {r["id"]: r for r in records if r.get("role") == "shadow"}
    assert ours.keys() == theirs.keys() == {f"r{i}" for i in range(6)}
    assert {r["version"] for r in theirs.values()} == {shadow["version"]}
    apart = [np.abs(np.subtract(ours[i]["probabilities"], theirs[i]["probabilities"])).max() for i in ours]
    assert sum(apart) == pytest.approx(total, abs=1e-4)


def test_share_of_the_requests_gets_the_second_bundle(
    served_bundle: Path, milder: Path, photo: np.ndarray, tmp_path: Path,
) -> None:
    with serving(tmp_path/"log", served_bundle, "--split", 0.3, milder) as server:
        content = encode(photo)
        ask = lambda name: server.ask("/predict", content, X_Request_Id=name).json
        first = {f"r{i}": ask(f"r{i}") for i in range(100)}
        assert all(ask(name)["version"] == first[name]["version"] for name in list(first)[:20])   # of the same bundle
        second = server.ask("/model").json["split"]["version"]
        found = Counter(a["version"] for a in first.values())
        assert {*found} == {server.version, second} and 15 <= found[second] <= 45
        assert len({(a["version"], a["confidence"]) for a in first.values()}) == 2
        assert server.ask("/v2/models/pets").json["versions"] == [server.version, second]
        raw = dict(name="images", datatype="UINT8", shape=[1, 20, 30, 3], data=photo.ravel().tolist())
        for version in server.version, second:   # a client can ask for one of them
            path = f"/v2/models/pets/versions/{version}/infer"
            answer = server.ask(path, json.dumps(dict(inputs=[raw])).encode())
            assert answer.json["model_version"] == version
        asked = {}
        for i in range(40):   # the id of the protocol's request chooses, whatever the head says
            for head in "a", "b":
                body = json.dumps(dict(id=f"r{i}", inputs=[raw])).encode()
                answer = server.ask("/v2/models/pets/infer", body, X_Request_Id=f"{head}{i}").json
                asked[head, f"r{i}"] = answer["model_version"]
                assert answer["id"] == f"r{i}"
        assert all(version == first[name]["version"] for (_, name), version in asked.items())
        counted = [server.metric(f'cvnb_predictions_total{{label="owl",model="pets",version="{v}"}}')
                   for v in (server.version, second)]
        assert sum(counted) == 202 and min(counted) > 0


def test_log_names_requests_by_the_id_in_their_bodies(
    served_bundle: Path, photo: np.ndarray, tmp_path: Path,
) -> None:
    raw = dict(name="images", datatype="UINT8", shape=[1, 20, 30, 3], data=photo.ravel().tolist())
    with serving(tmp_path/"out", served_bundle, "--log", tmp_path/"log") as server:
        for name in "mine-1", "no name/":
            server.ask("/v2/models/pets/infer", json.dumps(dict(id=name, inputs=[raw])).encode(), X_Request_Id="head")
        assert server.stop() == 0
    assert [record["id"] for record in read_request_log(tmp_path/"log")] == ["mine-1", "no name/"]


@pytest.mark.parametrize("option", ["--shadow", "--split"])
def test_second_bundle_that_does_not_fit_is_refused(served_bundle: Path, tmp_path: Path, option: str) -> None:
    given = [option] if option == "--shadow" else [option, 0.5]
    refused = [(dict(labels=["cat", "dog", "cow"]), 2, "other labels"), (dict(verdict=None), 1, "has no verdict")]
    for i, (change, code, said) in enumerate(refused):
        other = write_served_bundle(tmp_path/str(i), **change)
        done = cvnb("serve", served_bundle, "--port", 0, *given, other)
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("form", ["r{}", "user-{:05}", "{:024x}"])
def test_ids_that_count_up_are_split_evenly(form: str) -> None:
    share = float(np.mean([choose_split(form.format(i), 0.1) for i in range(3000)]))
    assert 0.08 < share < 0.12
