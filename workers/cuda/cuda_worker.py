#!/usr/bin/env python3
"""Holds memory of a real NVIDIA GPU and answers HTTP: what `make gpu` measures.

    cuda_worker.py --port 9000 --bytes 2147483648

Nothing but the driver is needed: its library is called directly. The GPU is the
first that CUDA_VISIBLE_DEVICES shows.
"""

import argparse
import ctypes
import http.server
import json
import os


def call(result, what):
    if result != 0:
        raise SystemExit(f"{what}: CUDA error {result}")


def take(size):
    """Makes a context, takes that much memory and writes to all of it."""
    cuda = ctypes.CDLL("libcuda.so.1")
    call(cuda.cuInit(0), "cuInit")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call(cuda.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    call(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    call(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    memory = ctypes.c_uint64()
    call(cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(size)), "cuMemAlloc")
    call(cuda.cuMemsetD8_v2(memory, ctypes.c_ubyte(1), ctypes.c_size_t(size)), "cuMemsetD8")
    call(cuda.cuCtxSynchronize(), "cuCtxSynchronize")
    return memory


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = json.dumps({"pid": os.getpid(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    arguments = parser.parse_args()
    held = take(arguments.bytes)
    print(f"holds {arguments.bytes} bytes at {held.value:#x}", flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", arguments.port), Answer).serve_forever()


if __name__ == "__main__":
    main()
