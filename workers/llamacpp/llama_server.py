#!/usr/bin/env python3
"""Starts llama.cpp's HTTP server with `llama-server`'s own flags.

When `llama-server` is on the PATH this program becomes it: the flags are passed on as they are. Otherwise
the same server is taken from the prebuilt Python wheel `xllamacpp`, for which the flags below are translated;
any other flag is an error, because a flag that is silently dropped changes what is served.

    llama_server.py -m model.gguf --host 127.0.0.1 --port 9000 -c 2048 -np 1 -t 1

RESIDENTD_LLAMA_SERVER=wheel takes the wheel even when `llama-server` is there; =binary never does.
"""

import argparse
import os
import shutil
import signal
import sys


def parser():
    """Returns the flags that both servers understand."""
    flags = argparse.ArgumentParser(prog="llama_server.py", allow_abbrev=False, description="llama.cpp's HTTP server")
    flags.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file")
    flags.add_argument("-a", "--alias", help="name under which the model is listed")
    flags.add_argument("--host", default="127.0.0.1", help="address to listen on")
    flags.add_argument("--port", type=int, default=8080)
    flags.add_argument("--reuse-port", action="store_true")
    flags.add_argument("-c", "--ctx-size", type=int, default=0, help="tokens of context; 0: the model's own")
    flags.add_argument("-np", "--parallel", type=int, default=1, help="requests at once")
    flags.add_argument("-t", "--threads", type=int, default=-1)
    flags.add_argument("--threads-http", type=int, default=-1)
    flags.add_argument("-b", "--batch-size", type=int, default=2048)
    flags.add_argument("-ub", "--ubatch-size", type=int, default=512)
    flags.add_argument("-ngl", "--gpu-layers", "--n-gpu-layers", type=int, default=-1)
    flags.add_argument("-cram", "--cache-ram", type=int, default=8192, metavar="MIB", help="prompt cache in host RAM")
    flags.add_argument("-lm", "--load-mode", choices=["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"], default="auto")
    flags.add_argument("--embedding", "--embeddings", dest="embedding", action="store_true")
    flags.add_argument("--pooling", choices=["none", "mean", "cls", "last", "rank"])
    flags.add_argument("--api-key", action="append", default=[])
    flags.add_argument("--metrics", action="store_true")
    flags.add_argument("--warmup", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument("--offline", action="store_true")
    flags.add_argument("--no-ui", action="store_true")
    return flags


def params(wheel, flags):
    """Translates the flags into the wheel's parameters."""
    to = wheel.CommonParams()
    to.model.path = flags.model
    if flags.alias:
        to.model_alias = {flags.alias}
    to.hostnames = [flags.host]
    to.port = flags.port
    to.reuse_port = flags.reuse_port
    to.n_ctx = flags.ctx_size
    to.n_parallel = flags.parallel
    to.cpuparams.n_threads = flags.threads
    to.n_threads_http = flags.threads_http
    to.n_batch = flags.batch_size
    to.n_ubatch = flags.ubatch_size
    to.n_gpu_layers = flags.gpu_layers
    to.cache_ram_mib = flags.cache_ram
    to.load_mode = getattr(wheel.llama_load_mode, "LLAMA_LOAD_MODE_" + {"dio": "DIRECT_IO"}.get(
        flags.load_mode, flags.load_mode.replace("+", "_").upper()))
    to.embedding = flags.embedding
    if flags.pooling:
        to.pooling_type = getattr(wheel.llama_pooling_type, "LLAMA_POOLING_TYPE_" + flags.pooling.upper())
    to.api_keys = flags.api_key
    to.endpoint_metrics = flags.metrics
    to.warmup = flags.warmup
    to.offline = flags.offline
    to.ui = not flags.no_ui
    return to


def become_binary(argv):
    """Becomes `llama-server` when it is to be used and there; returns otherwise."""
    wanted = os.environ.get("RESIDENTD_LLAMA_SERVER", "")
    if wanted not in ("", "wheel", "binary"):
        sys.exit(f"llama_server.py: RESIDENTD_LLAMA_SERVER={wanted!r} is neither wheel nor binary")
    binary = None if wanted == "wheel" else shutil.which("llama-server")
    if binary:
        sys.stdout.flush()
        os.execv(binary, [binary, *argv])
    if wanted == "binary":
        sys.exit("llama_server.py: llama-server is not on the PATH")


def main(argv):
    become_binary(argv)
    flags = parser().parse_args(argv)
    if not os.path.isfile(flags.model):
        sys.exit(f"llama_server.py: no model file {flags.model}")
    try:
        import xllamacpp as wheel
    except ImportError as error:
        sys.exit(f"llama_server.py: neither llama-server on the PATH nor the wheel xllamacpp ({error}): run scripts/setup-engines")
    # Requests that are in flight are the manager's business: it drains before it asks for the end.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        server = wheel.Server(params(wheel, flags))
    except Exception as error:  # The wheel raises plain RuntimeErrors.
        print(f"llama_server.py: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    print(f"llama_server.py: {flags.model} is served on {server.listening_address}", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
