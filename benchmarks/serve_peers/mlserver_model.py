"""MLServer: a runtime of its own, in the server's process."""
from __future__ import annotations

from common import FILE, open_model
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Bench(MLModel):
    "The model behind MLServer's protocol."
    async def load(self) -> bool:
        self.session = open_model(FILE)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        found = self.session.run(None, {"images": NumpyCodec.decode_input(payload.inputs[0])})[0]
        output = NumpyCodec.encode_output("probabilities", found)
        return InferenceResponse(model_name=self.name, outputs=[output])
