#!/usr/bin/env python3
"""NVIDIA's own client, unmodified, through residentd: REST and gRPC on one port.

    triton.py ADDRESS MODEL    a model whose outputs are its inputs, as the stub
                               worker's are, and that is not loaded

Needs `tritonclient[http,grpc]`. Prints a line for each thing that works; ends
with an error at the first that does not.
"""

import queue
import sys

import numpy
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException


def check(what, is_so):
    if not is_so:
        sys.exit(f"triton: {what}: NOT so")
    print(f"triton: {what}")


def states(index):
    """The states of all models, of either client's index."""
    if isinstance(index, dict):
        index = index.get("models", [])
    return {model["name"]: model["state"] for model in index}


def about_the_server(kind, client, model):
    check(f"{kind}: the server lives and is ready", client.is_server_live() and client.is_server_ready())
    metadata = client.get_server_metadata()
    name = metadata["name"] if isinstance(metadata, dict) else metadata.name
    check(f"{kind}: it says who it is", name == "residentd")
    check(f"{kind}: asking for readiness does not load", not client.is_model_ready(model))
    client.load_model(model)
    check(f"{kind}: a load ends with the model ready", client.is_model_ready(model))


def index_and_unload(kind, client, model, **how):
    index = client.get_model_repository_index(**how)
    check(f"{kind}: the index has it", states(index)[model] == "READY")
    client.unload_model(model)
    check(f"{kind}: an unload ends with it gone", not client.is_model_ready(model))


def refusals(kind, client, inputs):
    try:
        client.infer("no-such-model", inputs)
    except InferenceServerException as error:
        check(f"{kind}: an unknown model is named", "no-such-model" in error.message())
    else:
        sys.exit(f"triton: {kind}: an unknown model was answered")


def over_rest(address, model, data):
    module = tritonclient.http
    client = module.InferenceServerClient(address)
    about_the_server("REST", client, model)
    given = module.InferInput("x", list(data.shape), "FP32")
    given.set_data_from_numpy(data, binary_data=False)
    result = client.infer(model, [given])
    check("REST: inference", numpy.array_equal(result.as_numpy("x"), data))
    refusals("REST", client, [given])
    index_and_unload("REST", client, model)


def over_grpc(address, model, data):
    module = tritonclient.grpc
    client = module.InferenceServerClient(address)
    about_the_server("gRPC", client, model)
    given = module.InferInput("x", list(data.shape), "FP32")
    given.set_data_from_numpy(data)
    result = client.infer(model, [given], client_timeout=30)
    check("gRPC: inference", numpy.array_equal(result.as_numpy("x"), data))
    check("gRPC: metadata", client.get_model_metadata(model).name == model)
    refusals("gRPC", client, [given])
    # What does not become smaller is not compressed.
    zeros = numpy.zeros(10_000, dtype=numpy.float32)
    large = module.InferInput("x", list(zeros.shape), "FP32")
    large.set_data_from_numpy(zeros)
    try:
        client.infer(model, [large], compression_algorithm="gzip")
    except InferenceServerException as error:
        check("gRPC: a compressed message says the way out", "x-model" in error.message())
    else:
        sys.exit("triton: gRPC: a compressed message was answered")
    result = client.infer(model, [large], headers={"x-model": model}, compression_algorithm="gzip")
    check("gRPC: and that way leads out", result.get_response().model_name == model)

    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(10):
        given.set_data_from_numpy(data + number)
        client.async_stream_infer(model, [given], request_id=str(number))
        result, error = answers.get(timeout=30)
        if error:
            sys.exit(f"triton: gRPC: a stream broke: {error}")
        same = numpy.array_equal(result.as_numpy("x"), data + number)
        if not same or result.get_response().id != str(number):
            sys.exit(f"triton: gRPC: answer {number} of the stream is wrong")
    client.stop_stream()
    check("gRPC: a conversation of ten turns", True)
    index_and_unload("gRPC", client, model, as_json=True)


def main():
    address, model = sys.argv[1:]
    data = numpy.arange(12, dtype=numpy.float32).reshape(3, 4)
    over_rest(address, model, data)
    over_grpc(address, model, data)


if __name__ == "__main__":
    main()
