"""Fixed networks in every runtime, cvnb's files beside the peers' own ways, in one run.

    python benchmarks/inference.py --images FOLDER --write

Networks: ResNet-18, MobileNetV3-large and EfficientNet-Lite0 with inputs of 32 and 224 pixels. Where weights are
installed (EfficientNet-Lite0) they are the trained ones, otherwise random ones with confident answers: speed does not
depend on them. Rows:
- torch eager: the notebook's model
- onnx fp32, onnx int8: cvnb's files, in ONNX Runtime
- onnx static int8: ONNX Runtime's own static quantization, with its defaults
- openvino fp32: with the graph that answers as torch does
- openvino int8: OpenVINO's own quantization, by NNCF
Every row runs in its own process with one thread, from raw images to probabilities, and from a file's bytes to a label,
in alternating rounds. `answers` is the largest difference of a probability from torch's on the timed images, and
`same` the share of them with torch's class. The control's verdict is printed below each network's rows.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from table import show

NETWORKS = dict(resnet18="", mobilenetv3_large_100="", tf_efficientnet_lite0="imagenet")
SIDES = (32, 224)
MAX_GAP = 0.01   # of a probability from torch's, in FP32; a row further away is marked


def make_run(run: Path, backbone: str, side: int, images: list[np.ndarray], files: list[str]) -> list:
    "Write a network's files as a run has them, and list what is compared."
    import torch

    from cvnb.benchmark.peer_models import write_peer_models
    from cvnb.benchmark.table import list_candidates
    from cvnb.data.images import load_images
    from cvnb.export.onnx import export_models
    from cvnb.export.portable_graph import write_runtime_graphs
    from cvnb.export.quantize import QuantizationData, quantize_models
    from cvnb.models.inference import predict_proba
    from cvnb.models.weights import create_model, save_model
    torch.manual_seed(0)
    model = create_model(backbone, [str(i) for i in range(10)], side, weights=NETWORKS[backbone]).eval()
    if not NETWORKS[backbone]:
        with torch.no_grad(): model.net.get_classifier().weight *= 10   # random and confident
    for folder in "train", "export", "benchmark": (run/folder).mkdir(parents=True)
    save_model(model, run/"train")
    path = lambda name: run/"export"/name
    models = dict(trained=model)
    fp32 = export_models(models, path)
    write_runtime_graphs(models, fp32.files, images[:4], path)
    small = load_images("/", files, side)
    answers = predict_proba(model, small).argmax(1)   # what INT8 should not change
    quantize_models(fp32, path, QuantizationData(small, small, answers), tolerance=0.05)
    for name, reason in write_peer_models(run, lambda: images, lambda name: run/"benchmark"/name, []).items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    return list_candidates(run)


def measure(backbone: str, side: int, files: list[str], args: argparse.Namespace, work: Path) -> list[dict]:
    "Measure a network in every runtime."
    from cvnb.benchmark.answers import MIN_SAME_ANSWERS
    from cvnb.benchmark.table import OTHER_ANSWERS, model_size_mb
    from cvnb.benchmark.timing import measure_candidates, median_latency, speed_ratio, tail_latency
    from cvnb.export.runtimes import predict_mixed_sizes, read_pixels
    images = [read_pixels(file) for file in files]
    candidates = make_run(work/f"{backbone}-{side}", backbone, side, images, files)
    timed = files[:args.n_images]
    found = measure_candidates(candidates, images[:args.n_images], args.n_calls, args.rounds, 16, files=timed,
                               control_seconds=args.control_seconds, all_threads=args.all_threads)
    torch_row = next(c for c in candidates if c.runtime.name == "torch eager")
    expected = predict_mixed_sizes(torch_row.runtime.load(torch_row.path, 0), images)
    reference = found.timings[torch_row]
    rows = []
    for c, t in found.timings.items():
        answers = predict_mixed_sizes(c.runtime.load(c.path, 0), images)
        gap = float(np.abs(answers - expected).max())
        same = float((answers.argmax(1) == expected.argmax(1)).mean())
        apart = gap > MAX_GAP if c.runtime.precision == "fp32" else same < MIN_SAME_ANSWERS
        text = lambda e: f"{e.value:.3g}" + ("" if np.isnan(e.low) else f" [{e.low:.3g}, {e.high:.3g}]")
        name = c.runtime.name + OTHER_ANSWERS * apart
        row = {"network": backbone, "side": side, "runtime": name, "ms": text(median_latency(t.seconds)),
               "p90 ms": text(tail_latency(t.seconds, 90)), "p99 ms": text(tail_latency(t.seconds)),
               "CPU ms": text(median_latency(t.cpu_seconds)),
               "× torch, CPU": text(speed_ratio(reference.cpu_seconds, t.cpu_seconds)),
               "file to label CPU ms": text(median_latency(t.file_cpu_seconds)),
               "images/s, batch 16": 16 / float(np.median(t.batch_seconds)), "load s": t.load_seconds,
               "MB": model_size_mb(c.path), "memory MB": t.peak_memory_mb,
               "answers": gap, "same": same}
        if args.all_threads: row["every core ms"] = text(median_latency(t.all_threads))
        rows.append(row)
    print(found.control["verdict"], file=sys.stderr, flush=True)
    return [*rows, {**dict.fromkeys(rows[0], ""), "network": backbone, "side": side, "runtime": "control",
                    "ms": f"valid for: {found.control['clock']}"}]


def main() -> None:
    "Measure, and print the table."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder with JPEG files")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES))
    parser.add_argument("--n-images", type=int, default=16, help="images that are timed")
    parser.add_argument("--n-calls", type=int, default=60, help="timed calls per row, at least")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--control-seconds", type=float, default=30)
    parser.add_argument("--all-threads", action="store_true", help="measure with every core too")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/inference.md")
    args = parser.parse_args()
    found = sorted(p for p in Path(args.images).resolve().rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not found: parser.error(f"{args.images} has no JPEG files; give another folder with --images")
    files = [str(p) for p in found[::max(1, len(found) // 64)][:64]]
    with TemporaryDirectory() as work:
        rows = [row for name in args.networks for side in args.sides
                for row in measure(name, side, files, args, Path(work))]
    show("inference", "Fixed networks in every runtime, one thread", rows, args.write)


if __name__ == "__main__": main()
