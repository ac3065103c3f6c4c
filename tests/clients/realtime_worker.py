#!/usr/bin/env python3
"""A worker that speaks by websocket, as engines for realtime audio do, on the library `websockets`.

    realtime_worker.py --port PORT --name NAME

Sends `session.created` with its name and the path it was asked for; then sends back what comes, text as text and
bytes as bytes. `close` has it end the connection with code 4001. `/health` answers 200 by plain HTTP.
"""

import argparse
import http
import json

from websockets.sync.server import serve


def health(connection, request):
    return connection.respond(http.HTTPStatus.OK, "ok\n") if request.path == "/health" else None


def main():
    flags = argparse.ArgumentParser()
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--name", required=True)
    flags = flags.parse_args()

    def converse(websocket):
        request = websocket.request
        websocket.send(json.dumps({"type": "session.created", "name": flags.name, "path": request.path,
                                   "subprotocol": websocket.subprotocol}))
        for message in websocket:
            if message == "close":
                return websocket.close(4001, "as asked")
            websocket.send(message)

    with serve(converse, "127.0.0.1", flags.port, process_request=health, subprotocols=["realtime"],
               max_size=None) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
