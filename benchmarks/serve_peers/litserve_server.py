"""LitServe: one worker, no batching."""
from __future__ import annotations

import litserve as ls
import numpy as np
from common import FILE, PORT, open_model


class Api(ls.LitAPI):
    "The model behind LitServe's steps."
    def setup(self, device: str) -> None: self.session = open_model(FILE)

    def decode_request(self, request: dict) -> np.ndarray:
        (given,) = request["inputs"]
        return np.array(given["data"], np.uint8).reshape(given["shape"])

    def predict(self, images: np.ndarray) -> np.ndarray: return self.session.run(None, {"images": images})[0]

    def encode_response(self, found: np.ndarray) -> dict:
        output = dict(name="probabilities", shape=list(found.shape), datatype="FP32", data=found.ravel().tolist())
        return dict(model_name="bench", outputs=[output])


if __name__ == "__main__":
    server = ls.LitServer(Api(api_path="/v2/models/bench/infer"), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="error", access_log=False)
