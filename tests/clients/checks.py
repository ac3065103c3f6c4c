"""What the clients' scripts share: one line for each thing that works, and an end at the first that does not."""

import json
import sys
import time
import urllib.request

DEADLINE = 30


class Checks:
    """Says what was checked, under the name of the client that checks."""

    def __init__(self, client):
        self.client = client

    def check(self, what, is_so, seen=None):
        if not is_so:
            sys.exit(f"{self.client}: {what}: NOT so{'' if seen is None else f': {seen!r}'}")
        print(f"{self.client}: {what}", flush=True)

    def refused(self, what, kind, ask):
        """Returns the error of this kind that `ask` ends with."""
        try:
            answer = ask()
        except kind as error:
            return error
        sys.exit(f"{self.client}: {what}: answered with {answer!r}")


def model(address, name):
    """What residentd says of a model."""
    with urllib.request.urlopen(f"http://{address}/api/v1/models/{name}", timeout=DEADLINE) as answer:
        return json.load(answer)["data"]


def becomes(is_so):
    """Whether it is so before the deadline."""
    end = time.monotonic() + DEADLINE
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_idle(address, name):
    """Whether nobody is with the model's worker, or soon will not be."""
    return becomes(lambda: model(address, name)["in_flight"] == 0)


def speaks(name, text):
    """Whether the whole text is the model's: each word of it begins with its name, but for what a stub tells of itself."""
    words = [word for word in text.split() if not word.startswith(("pid=", "model=", "bytes=", "checksum="))]
    return bool(words) and all(word.startswith(name) for word in words)
