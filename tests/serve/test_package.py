"""The folder of a container: what `cvnb package` writes, its alerts and dashboard, and the image that is built."""
from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from servers import SHIP, TOKEN, Server, cvnb, encode, serving, write_served_bundle

from cvnb.core.errors import CvnbError
from cvnb.core.files import sha256_file
from cvnb.export.bundle import verify_bundle
from cvnb.serve.package import PACKAGED_FILES, PackageOptions, package_bundle

ROOT = Path(__file__).resolve().parents[2]
SERVING = ROOT/"configs/serving"
OF_PROMETHEUS = {"up"}   # which no service exports
TESTS = ("alerts_test.yaml", "alerts_day_test.yaml")


@pytest.fixture(scope="module")
def packed(served_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder of `cvnb package`."
    folder = tmp_path_factory.mktemp("package")/"pets"
    done = cvnb("package", served_bundle, folder)
    assert done.returncode == 0 and "docker build" in done.stdout, done.stderr
    return folder


# The folder


def test_folder_holds_what_the_table_says_and_the_bundle(packed: Path, served_bundle: Path) -> None:
    for target in PACKAGED_FILES.values(): assert (packed/target).stat().st_size, target
    files = {p.name: sha256_file(p) for p in (packed/"bundle").iterdir()}
    assert files == {p.name: sha256_file(p) for p in served_bundle.iterdir()}
    assert verify_bundle(packed/"bundle")
    assert not [p for p in packed.rglob("*") if p.name == "__pycache__"]
    text = "".join(p.read_text() for p in packed.rglob("*") if p.suffix in (".yaml", ".yml", ".md", "") and p.is_file())
    assert not re.search("@[A-Z]+@", text)


def test_container_has_no_rights_that_it_does_not_need(packed: Path) -> None:
    dockerfile = (packed/"Dockerfile").read_text()
    assert "\nUSER 10001:10001\n" in dockerfile and "--require-hashes" in dockerfile and "HEALTHCHECK" in dockerfile
    service = yaml.safe_load((packed/"compose.yaml").read_text())["services"]["service"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    for name in "deployment", "inferenceservice":
        (first, *_) = yaml.safe_load_all((packed/f"kubernetes/{name}.yaml").read_text())
        spec = first["spec"]["template"]["spec"] if name == "deployment" else first["spec"]["predictor"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        (container,) = spec["containers"]
        assert container["securityContext"] == dict(readOnlyRootFilesystem=True, allowPrivilegeEscalation=False,
                                                    capabilities=dict(drop=["ALL"])), name


def test_files_agree_on_image_token_and_probes(packed: Path) -> None:
    image = re.search(r"docker build -t (\S+) \.", (packed/"Dockerfile").read_text())[1]
    assert re.fullmatch(r"pets:[0-9a-f]{12}", image)
    containers = [yaml.safe_load((packed/"compose.yaml").read_text())["services"]["service"]]
    for name in "deployment", "inferenceservice", "knative":
        (first, *_) = yaml.safe_load_all((packed/f"kubernetes/{name}.yaml").read_text())
        spec = first["spec"].get("predictor") or first["spec"]["template"]["spec"]
        containers += spec["containers"]
        paths = {probe["httpGet"]["path"] for key, probe in spec["containers"][0].items() if key.endswith("Probe")}
        assert paths <= {"/v2/health/live", "/v2/health/ready"} and paths
        assert spec["containers"][0]["env"][0]["name"] == "CVNB_SERVE_TOKEN"
    assert [c["image"] for c in containers] == [image] * 4


def test_requirements_are_those_of_the_lock() -> None:
    check = [sys.executable, ROOT/"dev/serving_requirements.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (SERVING/"requirements.txt").read_text().splitlines()
    names = {re.match(r"[\w.-]+", line)[0] for line in lines if not line.startswith(" ")}
    assert {"onnxruntime", "starlette", "uvloop", "grpcio"} <= names and not names & {"torch", "pandas", "sigstore"}
    assert sum("--hash=sha256:" in line for line in lines) > len(names)


@pytest.mark.parametrize("case", ["none", "do not ship", "damaged", "not empty", "image"])
def test_what_cannot_be_packed_is_refused(case: str, served_bundle: Path, tmp_path: Path) -> None:
    bundle = served_bundle
    image = ""
    if case in ("none", "do not ship"):
        verdict = None if case == "none" else SHIP | dict(level="do not ship")
        bundle = write_served_bundle(tmp_path/"run", verdict)
    elif case == "damaged":
        bundle = write_served_bundle(tmp_path/"run")
        (bundle/"labels.txt").write_text("other\n")
    elif case == "not empty":
        (tmp_path/"out").mkdir()
        (tmp_path/"out/mine").touch()
    else: image = "Pets;rm"
    said = {"none": "has no verdict", "do not ship": "«do not ship»", "damaged": "labels.txt is missing or not",
            "not empty": "is not empty", "image": "is no name of an image"}[case]
    with pytest.raises(CvnbError, match=said): package_bundle(PackageOptions(bundle, tmp_path/"out", image))
    assert not (tmp_path/"out/Dockerfile").exists()


# The handler, without a container


def start_handler(folder: Path, log: Path, *arguments: str, **variables: str) -> Server:
    "Start the handler of a folder in this environment, as a platform would: with a port and a token."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | dict(PYTHONPATH=str(folder/"app"), CVNB_BUNDLE=str(folder/"bundle"), PORT=str(port),
                            CVNB_SERVE_TOKEN=TOKEN) | variables
    begin = time.monotonic()
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, folder/"app/handler.py", *arguments], stdout=out, stderr=out,
                                   cwd=log.parent, env=env)
    server = Server(process, log, 0.0, port=port, headers={"Authorization": f"Bearer {TOKEN}"})
    server.address = f"http://127.0.0.1:{port}"
    while True:
        try:
            with urllib.request.urlopen(f"{server.address}/v2/health/ready", timeout=1): break
        except OSError: assert process.poll() is None and time.monotonic() < begin + 60, server.text
        time.sleep(0.005)
    server.seconds = time.monotonic() - begin
    return server


def test_handler_takes_the_port_of_the_environment(packed: Path, photo: np.ndarray, tmp_path: Path) -> None:
    server = start_handler(packed, tmp_path/"log")
    try:
        assert server.ask("/predict", encode(photo)).json["model"] == "pets"
        health = [sys.executable, packed/"app/health.py"]
        assert subprocess.run(health, env=os.environ | dict(PORT=str(server.port))).returncode == 0
        assert server.stop() == 0
        assert subprocess.run(health, env=os.environ | dict(PORT=str(server.port))).returncode == 1
    finally:
        if server.process.poll() is None: server.process.kill()


def test_handler_without_a_token_does_not_start(packed: Path) -> None:
    env = os.environ | dict(PYTHONPATH=str(packed/"app"), CVNB_BUNDLE=str(packed/"bundle"), PORT="0")
    handler = [sys.executable, packed/"app/handler.py"]
    done = subprocess.run(handler, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "without a token" in done.stderr and len(done.stderr.splitlines()) == 1


# Alerts and dashboard


def metric_names(expression: str) -> set[str]:
    "List the metrics of a query."
    return {*re.findall(r"\b(?:cvnb|process|python)_\w+|\bup\b", expression)}


def queries() -> dict[str, list[str]]:
    "Read the queries of the alerts and of the dashboard."
    rules = [rule for group in yaml.safe_load((SERVING/"alerts.yaml").read_text())["groups"] for rule in group["rules"]]
    dashboard = json.loads((SERVING/"dashboard.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [v["query"]["query"] for v in dashboard["templating"]["list"]]
    return dict(alerts=[rule["expr"] for rule in rules], dashboard=panels + variables)


def exported(text: str) -> set[str]:
    "List the names under which Prometheus stores what a service exports."
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M):
        found |= {f"{name}_{end}" for end in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


@pytest.fixture(scope="module")
def scraped(served_bundle: Path, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    "The metrics of a service that has everything: a log, a shadow, a certificate."
    folder = tmp_path_factory.mktemp("scraped")
    arguments = ("--log", folder/"requests", "--shadow", served_bundle, "--tls-certificate", certificates/"good.pem",
                 "--tls-key", certificates/"good.key")
    with serving(folder/"log", served_bundle, *arguments) as server: return server.ask("/metrics").body.decode()


def test_alerts_and_dashboard_ask_for_what_the_service_exports(scraped: str) -> None:
    known = exported(scraped) | OF_PROMETHEUS
    for where, expressions in queries().items():
        named = set().union(*map(metric_names, expressions))
        assert len(named) > 8 and named <= known, f"{where}: {named - known}"
    assert metric_names("rate(cvnb_no_such_total[5m])") - known == {"cvnb_no_such_total"}


def test_labels_in_queries_have_values_that_the_service_knows(scraped: str) -> None:
    "A rate misses a series that begins with 1, so what alerts wait for is exported from the start."
    for name, label, value in (("errors", "kind", "queue_full"), ("errors", "kind", "timeout"),
                               ("fallbacks", "fallback", "previous"), ("model_swaps", "result", "refused"),
                               ("log_records", "result", "write_failed"), ("shadow_images", "result", "other")):
        assert f'cvnb_{name}_total{{{label}="{value}"}} 0.0' in scraped.splitlines(), (name, value)


def test_every_alert_has_unit_tests_that_pass(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", SERVING/"alerts.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([promtool, "test", "rules", *TESTS], capture_output=True, text=True, cwd=SERVING)
    assert done.returncode == 0, done.stdout + done.stderr
    rules = yaml.safe_load((SERVING/"alerts.yaml").read_text())["groups"][0]["rules"]
    tests = [test for name in TESTS for test in yaml.safe_load((SERVING/name).read_text())["tests"]]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules}


def loosen(rule: dict) -> None:
    "Make an alert sound without a reason."
    always = lambda found: "< 1e12" if found[1][0] == "<" else ">= 0"
    rule["expr"] = re.sub(r"(> 0\.\d+|> \d+|== 0|< 14 \* 86400)(?=\n|$)", always, rule["expr"], count=1)
    rule.pop("for", None)


@pytest.mark.long
def test_changed_alerts_fail_their_unit_tests(promtool: str, tmp_path: Path) -> None:
    text = (SERVING/"alerts.yaml").read_text()
    for file in TESTS: (tmp_path/file).write_text((SERVING/file).read_text())
    for i, name in enumerate(rule["alert"] for rule in yaml.safe_load(text)["groups"][0]["rules"]):
        changed = yaml.safe_load(text)
        loosen(changed["groups"][0]["rules"][i])
        assert changed != yaml.safe_load(text), name
        (tmp_path/"alerts.yaml").write_text(yaml.safe_dump(changed))
        done = subprocess.run([promtool, "test", "rules", *TESTS], capture_output=True, cwd=tmp_path)
        assert done.returncode, f"{name} sounds always, and no unit test fails"


def test_prometheus_configuration_is_valid(packed: Path, promtool: str, tmp_path: Path) -> None:
    text = (packed/"prometheus/prometheus.yml").read_text()
    (tmp_path/"token").touch()   # which compose puts there
    (tmp_path/"prometheus.yml").write_text(text.replace("/run/secrets/cvnb_token", str(tmp_path/"token")))
    (tmp_path/"alerts.yaml").write_text((packed/"prometheus/alerts.yaml").read_text())
    done = subprocess.run([promtool, "check", "config", tmp_path/"prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# The image, built without a daemon or a registry


TOOLS = ("mmdebstrap", "buildah", "umoci", "unshare", "chroot")
MAX_IMAGE_BYTES = 120e6   # compressed


@pytest.fixture(scope="module")
def image(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    "The image of a folder: its files, and the bytes of its compressed layers."
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing or os.geteuid(): pytest.skip(f"needs root and Debian's {', '.join(missing or TOOLS)}")
    folder = tmp_path_factory.mktemp("image")
    storage = "--root", folder/"storage", "--runroot", folder/"state", "--storage-driver", "vfs"

    def call(*command: object) -> None:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]

    def build(name: str, context: Path, *options: object) -> None:
        call("buildah", *storage, "bud", "--isolation", "chroot", "--network", "host", "--format", "docker", *options,
             "--tag", f"localhost/{name}", context)
    bases = dict(base=("extract", "python3,libstdc++6,ca-certificates"), build=("minbase", "python3,python3-pip"))
    for name, (variant, packages) in bases.items():
        (folder/name).mkdir()
        call("mmdebstrap", f"--variant={variant}", f"--include={packages}", "bookworm", folder/name/"root.tar")
        (folder/name/"Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
        build(name, folder/name)
    here = [p for p in (Path("/etc/pip.conf"), Path("/etc/ssl/certs")) if p.exists()]   # how this machine reaches PyPI
    build("pets", packed, "--build-arg", "BASE=localhost/base", "--build-arg", "BUILD_BASE=localhost/build",
          *(f"--volume={p}:{p}:ro" for p in here))
    call("buildah", *storage, "push", "localhost/pets", f"oci:{folder/'oci'}:pets")
    call("umoci", "unpack", "--image", f"{folder/'oci'}:pets", folder/"unpacked")
    for name in "storage", "base", "build": shutil.rmtree(folder/name)
    return folder/"unpacked/rootfs", sum(p.stat().st_size for p in (folder/"oci").rglob("*") if p.is_file())


def in_image(root: Path, *command: object) -> list[str]:
    "Write the command that runs in an image: as its user, with its environment, and without a place to write but /tmp."
    config = json.loads((root.parent/"config.json").read_text())["process"]
    assert (config["user"]["uid"], config["user"]["gid"]) == (10001, 10001)
    names = [text for text in config["env"] if text.startswith("PYTHON")]
    script = ('mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && mount -t tmpfs tmpfs "$1/tmp" || exit 9\n'
              'root=$1; shift; exec chroot --userspec=10001:10001 "$root" "$@"')
    keep = [f"{name}={os.environ[name]}" for name in ("PORT", "CVNB_SERVE_TOKEN") if name in os.environ]
    return ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp", *names, *keep,
            "unshare", "--mount", "sh", "-c", script, "sh", str(root), *map(str, command)]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_image_is_small_and_predicts(image: tuple[Path, int], packed: Path, photo: np.ndarray, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    root, n_bytes = image
    assert n_bytes < MAX_IMAGE_BYTES, f"{n_bytes:,} bytes"
    (root/"photo.png").write_bytes(encode(photo))
    run = "from cvnb.cli.app import main; main()"
    done = subprocess.run(in_image(root, "python3", "-c", run, "predict", "/bundle", "/photo.png", "--json"),
                          capture_output=True, text=True)
    (tmp_path/"photo.png").write_bytes(encode(photo))
    here = cvnb("predict", packed/"bundle", tmp_path/"photo.png", "--json")
    assert done.returncode == 0, done.stderr
    label, expected = (json.loads(text)["probabilities"] for text in (done.stdout, here.stdout))
    assert label == pytest.approx(expected, abs=1e-5)
    entry = json.loads((root.parent/"config.json").read_text())["process"]["args"]
    port = 20_000 + os.getpid() % 20_000
    monkeypatch.setenv("PORT", str(port))
    monkeypatch.setenv("CVNB_SERVE_TOKEN", TOKEN)
    begin = time.monotonic()
    with open(tmp_path/"log", "w") as out: process = subprocess.Popen(in_image(root, *entry), stdout=out, stderr=out)
    server = Server(process, tmp_path/"log", 0.0, port=port, headers={"Authorization": f"Bearer {TOKEN}"})
    server.address = f"http://127.0.0.1:{port}"
    try:
        server.wait_for("Ctrl-C ends it", 60)
        seconds = time.monotonic() - begin
        cpu = sum(psutil.Process(process.pid).cpu_times()[:2])
        assert server.ask("/predict", encode(photo)).json["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert "ERROR" not in server.text and "Read-only" not in server.text, server.text
        assert cpu < 1.5, f"{cpu} s of CPU time until it was ready"
        print(f"image: {n_bytes / 1e6:.1f} MB compressed; ready after {seconds:.2f} s, {cpu:.2f} s of CPU time")
        assert server.stop() == 0
    finally:
        if process.poll() is None: process.kill()
