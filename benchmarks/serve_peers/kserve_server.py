"""kserve's SDK: a model of its own, without gRPC."""
from __future__ import annotations

from common import FILE, PORT, open_model
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Bench(Model):
    "The model behind kserve's protocol."
    def __init__(self):
        super().__init__("bench")
        self.session = open_model(FILE)
        self.ready = True

    def predict(self, payload: InferRequest, headers: dict | None = None, response_headers: dict | None = None,
                ) -> InferResponse:
        found = self.session.run(None, {"images": payload.inputs[0].as_numpy()})[0]
        output = InferOutput("probabilities", list(found.shape), "FP32", found.ravel().tolist())
        return InferResponse(payload.id or "1", "bench", [output])


ModelServer(http_port=PORT, enable_grpc=False, enable_latency_logging=False).start([Bench()])
