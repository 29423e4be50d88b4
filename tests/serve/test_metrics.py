"""What Prometheus sees."""
from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
from servers import encode, serving


def test_metrics_keep_to_the_conventions_and_count(served_bundle: Path, photo: np.ndarray, tmp_path: Path,
                                                   promtool: str) -> None:
    with serving(tmp_path/"log", served_bundle, "--log", tmp_path/"requests") as server:
        content = encode(photo)
        labels = [server.ask("/predict", content).json["label"] for _ in range(3)]
        raw = dict(name="images", datatype="UINT8", shape=[2, 20, 30, 3], data=np.stack([photo] * 2).ravel().tolist())
        assert server.infer(dict(inputs=[raw])).status == 200
        assert server.ask("/predict", b"no image").status == 415
        assert [server.ask(f"/{i}").status for i in range(5)] == [404] * 5
        answer = server.ask("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        version = f'model="pets",version="{server.version}"'
        value = server.metric
        assert value('cvnb_requests_total{code="200",endpoint="predict"}') == 3
        assert value('cvnb_requests_total{code="415",endpoint="predict"}') == 1
        assert value('cvnb_requests_total{code="404",endpoint="other"}') == 5   # no series for each address
        assert value('cvnb_errors_total{kind="unsupported"}') == 1 and value('cvnb_errors_total{kind="not_found"}') == 5
        assert value(f'cvnb_predictions_total{{label="{labels[0]}",{version}}}') == 5
        assert value(f"cvnb_prediction_confidence_ratio_count{{{version}}}") == 5
        name, number = version.split(",")
        for step, n in dict(decode=3, queue=5, model=4).items():
            assert value(f'cvnb_step_duration_seconds_count{{{name},step="{step}",{number}}}') == n, step
        assert value('cvnb_request_duration_seconds_count{endpoint="infer"}') == 1
        assert value("process_resident_memory_bytes") > 3e7 and value("process_cpu_seconds_total") > 0
        loaded = f'precision="fp32",role="current",verdict="ship",version="{server.version}"}} 1.0'
        assert loaded in answer.body.decode()
        text = server.ask("/metrics").body
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_fault_in_metrics_is_found(promtool: str) -> None:
    faulty = b"# TYPE cvnb_requests counter\ncvnb_requests 1\n"
    done = subprocess.run([promtool, "check", "metrics"], input=faulty, capture_output=True)
    assert done.returncode and b"cvnb_requests" in done.stderr + done.stdout
