"""Who reaches a service: tokens, the loopback, certificates."""
from __future__ import annotations

import http.client
import os
import shutil
import signal
import ssl
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from servers import TOKEN, Server, cvnb, encode, serving

from cvnb.serve.access import AccessRules
from cvnb.serve.protocol import RequestError

OPEN = ("/", "/v2/health/live", "/v2/health/ready")
CLOSED = ("/v2", "/v2/models/pets", "/v2/models/pets/ready", "/metrics", "/model", "/openapi.json", "/nope")


@pytest.fixture(scope="module")
def guarded(served_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    "A server with a token from the environment."
    with serving(tmp_path_factory.mktemp("guarded")/"log", served_bundle, token=TOKEN) as server: yield server


def test_every_address_but_three_needs_the_token(guarded: Server, photo: np.ndarray) -> None:
    for path in CLOSED: assert guarded.ask(path).status in (200, 404)
    known = guarded.headers
    try:
        for wrong in {}, {"Authorization": "Bearer " + TOKEN[:-1]}, {"Authorization": TOKEN}, \
                {"Authorization": "Bearer"}, {"Authorization": "Basic " + TOKEN}, {"Authorization": "Bearer é" * 99}:
            guarded.headers = wrong
            for path in CLOSED:
                answer = guarded.ask(path)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer", path
            assert guarded.ask("/predict", encode(photo)).status == 401
            assert guarded.ask("/v2/models/pets/infer", b"{}").status == 401
        for path in OPEN: assert guarded.ask(path).status == 200
        assert guarded.ask("/predict", bytes(2_000_000)).status == 401   # the body is thrown away, the answer arrives
    finally: guarded.headers = known


def test_time_of_a_refusal_does_not_tell_the_token() -> None:
    rules = AccessRules(TOKEN)

    def seconds(token: str) -> float:
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            with pytest.raises(RequestError): rules.check(dict(authorization=f"Bearer {token}"))
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    first, last = seconds("x" + TOKEN[1:]), seconds(TOKEN[:-1] + "x")
    assert 0.5 < first / last < 2


def test_without_a_token_only_this_machine_is_answered(server: Server, photo: np.ndarray) -> None:
    assert server.ask("/v2").status == 200
    for headers in dict(Host="evil.example"), dict(Origin="http://evil.example"), dict(Origin="null"):
        for path in "/", "/v2/health/live", "/model":
            answer = server.ask(path, **headers)
            assert answer.status == 403 and "127.0.0.1" in answer.json["error"]
        assert server.ask("/predict", encode(photo), **headers).status == 403
    assert server.ask("/predict", encode(photo), Origin=server.address).status == 200


@pytest.mark.parametrize("arguments, said", [
    (("--host", "0.0.0.0"), "without a token"), (("--host", "::"), "without a token"),
    (("--host", "no such host"), "has no address"), (("--token-file", "absent"), "cannot be read"),
    (("--bundles", "absent"), "not a folder"), (("--tls-key", "absent"), "needs its key"),
    (("--tls-key", "absent", "--tls-certificate", "absent"), "does not exist"), (("--precision", "fp16"), "fp16"),
    (("--log", "/proc/log"), "request log")])
def test_wrong_option_is_refused_before_anything_listens(served_bundle: Path, arguments: tuple, said: str) -> None:
    done = cvnb("serve", served_bundle, "--port", 0, *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_token_file(served_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path/"token"
    file.write_text("short\n")
    assert cvnb("serve", served_bundle, "--token-file", file).returncode == 2
    file.write_text(TOKEN + "\n")
    file.chmod(0o644)
    with serving(tmp_path/"log", served_bundle, "--token-file", file, "--host", "0.0.0.0") as server:
        server.wait_for("! every user of this machine can read")
        server.wait_for("! images and the token are not encrypted")
        server.headers = {"Authorization": f"Bearer {TOKEN}"}
        assert server.ask("/v2").status == 200
        file.write_text("another-token-of-sixteen")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("answers now")
        assert server.ask("/v2").status == 401
        server.headers = {"Authorization": "Bearer another-token-of-sixteen"}
        assert server.ask("/v2").status == 200
        commands = Path(f"/proc/{server.process.pid}/cmdline").read_text()
        assert TOKEN not in commands + server.text


# Certificates


def tls(folder: Path, name: str, key: str = "") -> tuple:
    "Name the files of a certificate as options."
    return "--tls-certificate", folder/f"{name}.pem", "--tls-key", folder/(key or f"{name}.key")


def test_service_speaks_tls(served_bundle: Path, certificates: Path, photo: np.ndarray, tmp_path: Path) -> None:
    for name in "good.pem", "good.key": shutil.copy(certificates/name, tmp_path)
    with serving(tmp_path/"log", served_bundle, *tls(tmp_path, "good")) as server:
        context = ssl.create_default_context(cafile=str(certificates/"good.pem"))
        connection = http.client.HTTPSConnection("localhost", server.port, context=context)
        connection.request("POST", "/predict", encode(photo), {"Origin": f"https://localhost:{server.port}"})
        assert connection.getresponse().status == 200
        with pytest.warns(DeprecationWarning): context.maximum_version = ssl.TLSVersion.TLSv1_1
        old = http.client.HTTPSConnection("localhost", server.port, context=context)
        with pytest.raises(OSError): old.request("GET", "/")
        with pytest.raises((http.client.HTTPException, OSError)):
            plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            plain.request("GET", "/")
            plain.getresponse()
        expires = server.metric("cvnb_certificate_expiry_timestamp_seconds")
        assert expires == pytest.approx(time.time() + 90 * 86_400, abs=99)
        for suffix in ".pem", ".key": os.replace(shutil.copy(certificates/f"another{suffix}", tmp_path/"new"),
                                                 tmp_path/f"good{suffix}")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("answers now")
        assert ssl.get_server_certificate(("127.0.0.1", server.port)) == (certificates/"another.pem").read_text()


@pytest.mark.parametrize("name, key, code, said", [
    ("expired", "", 1, "has expired"), ("early", "", 1, "not yet valid"), ("good", "another.key", 2, "cannot be used"),
    ("good", "good.locked", 2, "cannot be used"), ("absent", "good.key", 2, "does not exist")])
def test_certificate_that_is_not_valid_is_refused(
    served_bundle: Path, certificates: Path, name: str, key: str, code: int, said: str,
) -> None:
    done: subprocess.CompletedProcess = cvnb("serve", served_bundle, "--port", 0, *tls(certificates, name, key))
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_certificate_that_expires_soon_is_named(served_bundle: Path, certificates: Path, tmp_path: Path) -> None:
    with serving(tmp_path/"log", served_bundle, *tls(certificates, "another")) as server:
        server.wait_for("expires in 3 days")


@pytest.mark.parametrize("given, said", [
    (("--name", "a b/c"), "--name 'a b/c' is no name for an address"),
    (("--split", 1.5, "."), "--split 1.5 is no share of the requests"),
    (("--bundles", "."), "--bundles needs a token"), (("--log-images",), "need a log"),
    (("--log-days", 3), "need a log"),
    (("--port", 8080, "--grpc-port", 8080), "are both 8080")])
def test_options_that_do_not_fit_are_refused_in_one_line(served_bundle: Path, given: tuple, said: str) -> None:
    done = cvnb("serve", served_bundle, *given)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
