"""The model as each peer runs it: one thread inside of it."""
from __future__ import annotations

import os

import onnxruntime as ort


def open_model(
    file: str,   # an ONNX file
) -> ort.InferenceSession:
    "Open the model."
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


FILE = os.environ["PEER_MODEL"]
PORT = int(os.environ["PEER_PORT"])
