"""Nothing calls home: commands run with the network watched and a fresh home folder."""
from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import network
import pytest
from conftest import write_small_photos
from projects import write_project

BIN = Path(sys.executable).parent
# A small run of all six stages.
SMALL = [arg for setting in ("train.backbone=resnet10t", "train.weights=", "train.epochs=1", "compress.epochs=1",
                             "benchmark.n_calls=20", "benchmark.rounds=3",
                             "benchmark.control_seconds=0") for arg in ("--set", setting)]
STAGES = ("audit", "train", "errors", "compress", "export", "benchmark")
# What may appear in the home folder of a user who has never run anything.
ALLOWED = [
    ".cache/cvnb/*",                           # data sets and rows
    ".cache/matplotlib/fontlist-*.json",       # fonts of this machine
    ".cache/wandb/logs/*.log",                 # of W&B's process
    ".fiftyone/var/lib/mongo/*",               # FiftyOne's database
    ".ipython/profile_default/*",              # history, and an empty profile
    ".local/share/jupyter/nbsignatures.db",    # which notebooks Jupyter trusts on this machine
    ".local/share/jupyter/notebook_secret",    # the key of these signatures
]
LOCAL = '4242 connect(3, {sa_family=AF_INET, sin_port=htons(8000), sin_addr=inet_addr("127.0.0.1")}, 16) = 0'
DNS = LOCAL.replace("8000", "53").replace("127.0.0.1", "10.0.0.1")


def stays_here(watched: network.Watched, *also_allowed: str) -> None:
    assert watched.trace.count("\n") > 3, "strace saw nothing"
    assert network.attempts(watched.trace) == []
    assert watched.unexpected_files([*ALLOWED, *also_allowed]) == []


@pytest.mark.parametrize("line, fault", [
    (LOCAL, ""),
    (LOCAL.replace("127.0.0.1", "127.1.2.3").replace(") = 0", " <unfinished ...>"), ""),
    ("4242  <... connect resumed>) = 0", ""),
    ("4242  +++ superseded by execve in pid 4243 +++", ""),
    ("4242  ???( <detached ...>", ""),
    ("4242  ???(3, 0x7ffc, 16) = 0", "not understood"),
    ('1 connect(3, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "::1", '
     '&sin6_addr), sin6_scope_id=0}, 28) = 0', ""),
    ('1 connect(3, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, '
     '"2001:db8::1", &sin6_addr), sin6_scope_id=0}, 28) = -1 ENETUNREACH', "leaves the machine"),
    ('1 connect(3, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, '
     '"::ffff:10.0.0.1", &sin6_addr), sin6_scope_id=0}, 28) = 0', "leaves the machine"),
    (LOCAL.replace("127.0.0.1", "0.0.0.0"), "leaves the machine"),
    (DNS, "resolves a name"),
    (LOCAL.replace("8000", "53"), "resolves a name"),
    ('1 sendto(3, "\\1\\2", 2, MSG_NOSIGNAL, {sa_family=AF_INET, sin_port=htons(9), sin_addr=inet_addr("10.0.0.1")}, '
     '16) = 2', "leaves the machine"),
    ('1 <... sendmmsg resumed>[{msg_hdr={msg_name={sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr('
     '"127.0.0.53")}, msg_namelen=16}, msg_len=2}], 1, 0) = 1', "resolves a name"),
    ('1 sendto(3, "\\1\\2", 2, 0, NULL, 0) = 2', ""),
    ('1 connect(3, {sa_family=AF_UNIX, sun_path="/tmp/x"}, 110) = 0', ""),
    ('1 connect(3, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = 0', ""),
    ('1 sendto(3, "\\2\\0\\0\\0\\v\\0\\0\\0\\7\\0\\0\\0passwd\\0", 19, MSG_NOSIGNAL, NULL, 0) = 19', ""),
    ('1 sendto(3, "\\2\\0\\0\\0\\r\\0\\0\\0\\6\\0\\0\\0hosts\\0", 18, MSG_NOSIGNAL, NULL, 0) = 18', "resolves a name"),
    ('1 connect(3, {sa_family=AF_UNIX, sun_path="/run/systemd/resolve/io.systemd.Resolve"}, 42) = 0',
     "resolves a name"),
    ("1 connect(3, {sa_family=AF_VSOCK, svm_cid=0x2, svm_port=0x1}, 16) = 0", "not understood"),
    ("1 connect(3, 0x7ffc, 16) = -1 EFAULT (Bad address)", "not understood"),
    ("1 socketcall(3, 0x7ffc) = 0", "not understood"),
])
def test_each_call_that_leaves_the_machine_is_found(line: str, fault: str) -> None:
    assert network.attempts(line) == ([f"{fault}: {line}"] if fault else [])


def resolving(name: str) -> str:   # Python code
    return f"import socket\ntry: socket.getaddrinfo({name!r}, 80)\nexcept OSError: pass"


@pytest.mark.usefixtures("strace")
def test_names_that_a_stage_and_its_worker_resolve_are_found(tmp_path: Path) -> None:
    worker = f'import subprocess, sys\nsubprocess.run([sys.executable, "-c", {resolving("worker.invalid")!r}])'
    project = write_project(tmp_path/"project", one=f'{resolving("stage.invalid")}\n{worker}')
    watched = network.watch(tmp_path, BIN/"cvnb", "run", cwd=project, RES_OPTIONS="timeout:1 attempts:1")
    found = network.attempts(watched.trace)
    assert found and {line.partition(": ")[0] for line in found} == {"resolves a name"}
    assert {name for name in ("stage", "worker") if rf"{name}\7invalid" in watched.trace} == {"stage", "worker"}
    assert watched.unexpected_files(ALLOWED) == []


@pytest.mark.usefixtures("strace")
def test_the_device_id_of_onnxruntime_is_found(tmp_path: Path) -> None:
    load = [sys.executable, "-c", "import cvnb, onnxruntime"]
    reported = network.watch(tmp_path/"on", *load, ORT_DISABLE_TELEMETRY="0")
    assert reported.unexpected_files(ALLOWED), "the user's own setting is not kept, or onnxruntime has changed"
    assert network.watch(tmp_path/"off", *load).files() == []


@pytest.fixture(scope="module")
def chain(strace: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, network.Watched]:
    "A run of all six stages under watch, and what was seen."
    folder = tmp_path_factory.mktemp("watched")
    photos, run = write_small_photos(folder/"photos"), folder/"runs/small"
    return run, network.watch(folder, BIN/"cvnb", "run", "--data", photos, "--run", run, *SMALL)


@pytest.mark.slow
def test_all_stages_stay_on_this_machine(chain: tuple[Path, network.Watched]) -> None:
    run, watched = chain
    assert "openvino int8" in watched.out, "OpenVINO, which reports too, was not measured"
    assert {p.parent.name for p in run.glob("*/stage.json")} == {*STAGES}
    stays_here(watched)


@pytest.mark.slow
def test_predict_stays_on_this_machine_and_leaves_no_file(chain: tuple[Path, network.Watched], tmp_path: Path) -> None:
    run, watched = chain
    image = next((watched.home.parent/"photos").rglob("*.png"))
    predicted = network.watch(tmp_path, BIN/"cvnb", "predict", run/"export/bundle", image, "--json")
    assert network.attempts(predicted.trace) == [] and predicted.files() == []


# What takes longer


def get(process: subprocess.Popen, *queries: str) -> list[str]:
    "Get the page of a server that prints its address, then ask its GraphQL."
    address = next(m[0] for line in process.stdout if (m := re.search(r"http://\S+", line)))
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    pages = [opener.open(address, timeout=300).read().decode()]
    for query in queries:
        where, body = urllib.parse.urljoin(address, "/graphql"), json.dumps(dict(query=query)).encode()
        request = urllib.request.Request(where, body, {"Content-Type": "application/json"})
        pages.append(opener.open(request, timeout=300).read().decode())
    return pages


@pytest.mark.long
def test_dashboard_stays_on_this_machine(chain: tuple[Path, network.Watched]) -> None:
    run, watched = chain
    pages: list[str] = []
    command = (BIN/"cvnb", "dashboard", run, "--no-browser")
    stays_here(network.watch(watched.home.parent, *command, use=lambda process: pages.extend(get(process))))
    assert "cvnb-" in pages[0]


@pytest.mark.long
def test_app_stays_on_this_machine_and_makes_no_user_id(chain: tuple[Path, network.Watched]) -> None:
    run, watched = chain
    pages: list[str] = []
    command = (BIN/"cvnb", "browse", run, "--no-open")
    stays_here(network.watch(watched.home.parent, *command, use=lambda p: pages.extend(get(p, "{ uid doNotTrack }"))))
    assert json.loads(pages[1]) == {"data": dict(uid="", doNotTrack=True)}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    "A project whose stage takes no time; the real stages are watched above."
    return write_project(tmp_path/"project", "seed: int = 0\nlr: float = 0.1", train='stage.metric("accuracy_val", lr)')


SWEEP = [str(BIN/"cvnb"), "sweep", "--search", "optuna", "--trials", "2", "--set", "train.lr=0.1,0.2"]


@pytest.mark.long
@pytest.mark.usefixtures("strace")
def test_search_with_optuna_stays_on_this_machine(project: Path, tmp_path: Path) -> None:
    stays_here(network.watch(tmp_path, *SWEEP, cwd=project))


@pytest.mark.long
@pytest.mark.usefixtures("strace")
def test_sweep_on_a_ray_cluster_stays_on_this_machine(project: Path, tmp_path: Path) -> None:
    "The head node is a program of the user; what it does in any case is kept from it, so that the rest is cvnb's."
    (tmp_path/"home").mkdir()
    (tmp_path/"home/ray_bootstrap_config.yaml").write_text("provider: {type: local}")   # else it looks for a cloud
    reports = dict(RAY_USAGE_STATS_REPORT_URL="http://127.0.0.1:9")   # it reports that it reports nothing
    script = f"""
import subprocess, cvnb
from ray.cluster_utils import Cluster
head = dict(num_cpus=2, include_dashboard=False, node_ip_address="127.0.0.1")
cluster = Cluster(initialize_head=True, head_node_args=head)
try: subprocess.run([*{SWEEP!r}, "--engine", "ray", "--address", cluster.address], check=True)
finally: cluster.shutdown()"""
    watched = network.watch(tmp_path, sys.executable, "-c", script, cwd=project, **reports)
    # Ray asks a UDP socket that is connected to 8.8.8.8, and sends nothing, for the address of this machine.
    own_address = 'sin_port=htons(53), sin_addr=inet_addr("8.8.8.8")'
    watched.trace = "\n".join(line for line in watched.trace.splitlines() if own_address not in line)
    stays_here(watched, "ray_bootstrap_config.yaml")
