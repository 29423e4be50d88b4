"""FastAPI with models of pydantic for request and answer, and a `def` handler, as its documentation has it."""
from __future__ import annotations

import numpy as np
import uvicorn
from common import FILE, PORT, open_model
from fastapi import FastAPI
from pydantic import BaseModel


class Tensor(BaseModel):
    "An input."
    name: str
    shape: list[int]
    datatype: str
    data: list[int]


class Request(BaseModel):
    "A request."
    inputs: list[Tensor]


class Output(BaseModel):
    "An output."
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Answer(BaseModel):
    "An answer."
    model_name: str
    outputs: list[Output]


app = FastAPI()
session = open_model(FILE)


@app.post("/v2/models/bench/infer")
def infer(request: Request) -> Answer:
    "Answer a request."
    (given,) = request.inputs
    found = session.run(None, {"images": np.array(given.data, np.uint8).reshape(given.shape)})[0]
    output = Output(name="probabilities", shape=list(found.shape), datatype="FP32", data=found.ravel().tolist())
    return Answer(model_name="bench", outputs=[output])


uvicorn.run(app, port=PORT, access_log=False, log_level="error")
