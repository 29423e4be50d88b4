"""Convert a model to LiteRT, or run it: for the environment of litert.txt, which has no cvnb.

    python litert.py convert MODEL.pt2 SIDE TARGET.tflite
    python litert.py serve MODEL.tflite THREADS

`convert` reads a program of torch.export that takes one image, uint8 (1, SIDE, SIDE, 3). `serve` writes a line of JSON
about the model; then it answers each image that it reads from its input, SIDE × SIDE × 3 bytes, with float32 values.
"""
from __future__ import annotations

import json
import sys


def convert(source: str, side: str, target: str) -> None:
    "Write a .tflite file."
    import litert_torch
    import torch
    example = torch.zeros(1, int(side), int(side), 3, dtype=torch.uint8)
    program = torch.export.load(source)
    litert_torch.convert(program.module(), (example,)).export(target)


def serve(path: str, threads: str) -> None:
    "Answer images until the input ends."
    import ai_edge_litert
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter
    out = sys.stdout.buffer
    model = Interpreter(path, num_threads=int(threads) or None)
    model.allocate_tensors()
    given = model.get_input_details()[0]
    made = model.get_output_details()[0]
    shape = [int(n) for n in given["shape"]]
    about = dict(shape=shape, dtype=np.dtype(given["dtype"]).name, outputs=int(made["shape"][-1]),
                 version=ai_edge_litert.__version__)
    out.write(json.dumps(about).encode() + b"\n")
    out.flush()
    size = int(np.prod(shape))
    while len(content := sys.stdin.buffer.read(size)) == size:
        model.set_tensor(given["index"], np.frombuffer(content, np.uint8).reshape(shape))
        model.invoke()
        out.write(model.get_tensor(made["index"]).astype(np.float32).tobytes())
        out.flush()


if __name__ == "__main__": dict(convert=convert, serve=serve)[sys.argv[1]](*sys.argv[2:])
