#!/usr/bin/env python3
"""A websocket client, the library `websockets`, through residentd.

    websocket.py ADDRESS MODEL ALIAS    a model that is realtime_worker.py
"""

import contextlib
import json
import os
import socket
import sys
import threading

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from checks import DEADLINE, Checks, becomes, is_idle
from checks import model as state

checks = Checks("websockets")
check = checks.check


def join(address, path, **more):
    return connect(f"ws://{address}{path}", subprotocols=["realtime"], open_timeout=DEADLINE, max_size=None, **more)


def hello(websocket):
    return json.loads(websocket.recv(timeout=DEADLINE))


def conversation(address, path, name, expected):
    """Text and bytes of every size, in order, both ways; then the worker's own goodbye."""
    with join(address, path) as websocket:
        said = hello(websocket)
        check(f"{path}: the worker is {name} and gets {expected}", said["name"] == name and said["path"] == expected, said)
        check(f"{path}: the subprotocol is agreed on", websocket.subprotocol == said["subprotocol"] == "realtime")
        check(f"{path}: the model is in use", state(address, name)["in_flight"] == 1)
        sizes = [0, 1, 125, 126, 65_535, 65_536, 1_000_000]
        messages = [os.urandom(size) for size in sizes] + ["text", "ü" * 100_000]
        # Both directions at once: neither waits for the other's end.
        sending = threading.Thread(target=lambda: [websocket.send(message) for message in messages])
        sending.start()
        back = [websocket.recv(timeout=DEADLINE) for _ in messages]
        sending.join(DEADLINE)
        check(f"{path}: what is said comes back, in order", back == messages, [len(message) for message in back])
        check(f"{path}: a ping is answered", websocket.ping().wait(DEADLINE))
        websocket.send("close")
        closed = checks.refused("a connection that the worker closes", ConnectionClosed,
                                lambda: websocket.recv(timeout=DEADLINE))
        check(f"{path}: the worker's goodbye arrives", closed.rcvd.code == 4001 and closed.rcvd.reason == "as asked", closed)
    check(f"{path}: and the model is free", is_idle(address, name))


def main():
    address, name, alias = sys.argv[1:]
    # A client that opens the connection loads the model, and waits for it.
    conversation(address, f"/v1/realtime?model={name}", name, f"/v1/realtime?model={name}")
    conversation(address, f"/v1/realtime?model={alias}", name, f"/v1/realtime?model={alias}")
    conversation(address, f"/upstream/{name}/any/path?x=1", name, "/any/path?x=1")
    conversation(address, f"/upstream/{alias}/ws", name, "/ws")
    with join(address, "/v1/any", additional_headers={"x-model": name}) as websocket:
        check("the header x-model names it too", hello(websocket)["name"] == name)
        # No goodbye: the connection is cut.
        websocket.socket.shutdown(socket.SHUT_RDWR)
    check("a client that is gone without a word leaves the worker free", is_idle(address, name))
    for path in ["/v1/realtime?model=no-such", "/upstream/no-such/ws"]:
        error = checks.refused(path, InvalidStatus, lambda: join(address, path))
        answer = json.loads(error.response.body)["error"]
        check(f"{path} is refused by 404", error.response.status_code == 404 and answer["code"] == "model_not_found", answer)
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(join(address, f"/v1/realtime?model={name}")) for _ in range(20)]
        check("twenty at once", all(hello(websocket)["name"] == name for websocket in many))
        check("are counted", becomes(lambda: state(address, name)["in_flight"] == 20))
    check("and go", is_idle(address, name))


if __name__ == "__main__":
    main()
