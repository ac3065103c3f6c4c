#!/usr/bin/env python3
"""Requests that two readers may take for different ones (the tests of the crate http_desync_guardian), through residentd.

    desync.py ADDRESS MODEL HEADS SUITE...    MODEL's worker is the next, and HEADS its file
    desync.py worker PORT HEADS               answers anything, and writes down each head that it gets

What the suites call severe is refused and reaches no worker. Whatever else reaches one has one framing, and headers
that are such. A request whose body does not follow may go unanswered.
"""

import pathlib
import socket
import sys
import threading

import yaml

from checks import Checks

check = Checks("desync").check
END = b"\r\n\r\n"


def record(client, heads):
    head = b""
    client.settimeout(10)
    try:
        while END not in head:
            piece = client.recv(65536)
            if not piece:
                return
            head += piece
        if not head.startswith(b"GET /health "):
            with heads.open("ab") as file:
                file.write(head.split(END)[0] + END)
        client.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass
    except OSError:
        pass
    finally:
        client.close()


def work(port, heads):
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=record, args=(client, heads), daemon=True).start()


def written(case, model):
    """The request of a case as it goes over the wire."""
    headers = [(str(header.get("name") or ""), str(header.get("value") or "")) for header in case.get("headers") or []]
    if "host" not in [name.lower() for name, _ in headers]:
        headers.insert(0, ("host", "x"))
    headers.insert(0, ("x-model", model))
    uri = str(case.get("uri") or "")
    path = f"/upstream/{model}{uri}" if uri.startswith("/") else uri
    lines = [f"{case.get('method') or ''} {path} {case.get('version') or ''}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode("utf-8") + END


def is_clear(head):
    """Whether a head that reached the worker is read alike by everybody."""
    lines = [line.lower() for line in head.split(b"\r\n")[1:]]
    framings = [line for line in lines if line.startswith((b"content-length", b"transfer-encoding"))]
    exact = all(line == b"transfer-encoding: chunked" or line.removeprefix(b"content-length: ").isdigit() for line in framings)
    plain = all(line.partition(b":")[0].isascii() and b":" in line and not {10, 13, 0} & set(line)
                and line[:1] not in b" \t" for line in lines)
    return len(framings) <= 1 and exact and plain


def send(address, request):
    """The status of the answer; None without one."""
    with socket.create_connection(address) as client:
        client.settimeout(0.5)
        try:
            client.sendall(request)
            answer = client.recv(4096)
        except OSError:
            return None
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.") else None


def main(address, model, heads, *suites):
    host, port = address.rsplit(":", 1)
    heads, counts = pathlib.Path(heads), {}
    for suite in suites:
        for case in yaml.safe_load(pathlib.Path(suite).read_text(encoding="utf-8")):
            heads.write_bytes(b"")
            tier, request = case["expected"]["tier"], written(case, model)
            status = send((host, int(port)), request)
            got = heads.read_bytes().split(END)[:-1]
            is_good = (status, got) == (400, []) if tier == "Severe" else len(got) <= 1 and all(map(is_clear, got))
            if not is_good:
                check(f"{suite}: {case['name']}", False, (status, request, got))
            fate = "passed on with one framing" if got else "refused" if status else "waited for"
            counts[tier, fate] = counts.get((tier, fate), 0) + 1
    for (tier, fate), count in sorted(counts.items()):
        check(f"{tier.lower()}: {count} {fate}", True)
    check("all suites were sent", sum(counts.values()) > 150 and counts.get(("Compliant", "passed on with one framing"), 0) > 10, counts)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        work(int(sys.argv[2]), pathlib.Path(sys.argv[3]))
    else:
        main(*sys.argv[1:])
