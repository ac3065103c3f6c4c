#!/usr/bin/env python3
"""Anthropic's own Python client, unmodified, through residentd.

    anthropic_sdk.py ADDRESS MODEL ALIAS [stub]

MODEL, also called ALIAS, speaks `/v1/messages` and begins each word it says
with its name. With `stub` also what only a stub does; a model `narrow` takes
one request and lets one wait.
"""

import sys
import threading

import anthropic

from checks import DEADLINE, Checks, becomes, is_idle, speaks
from checks import model as state

checks = Checks("anthropic (Python)")
check = checks.check
HELLO = [{"role": "user", "content": "Hello"}]
ORDER = ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"]


def client_of(base_url):
    return anthropic.Anthropic(base_url=base_url, api_key="none", timeout=DEADLINE, max_retries=0)


def messages(client, name, alias):
    answer = client.messages.create(model=name, messages=HELLO, max_tokens=5)
    check("a message", answer.role == "assistant" and speaks(name, answer.content[0].text), answer)
    check("a message says what it used and why it ended", answer.usage.output_tokens == 5
          and answer.stop_reason == "max_tokens", answer)
    answer = client.messages.create(model=alias, messages=HELLO, max_tokens=2)
    check("a message by an alias", speaks(name, answer.content[0].text), answer)
    count = client.messages.count_tokens(model=name, messages=HELLO)
    check("a count of tokens", count.input_tokens > 0, count)
    listed = [model.id for model in client.models.list()]
    check("models are listed", name in listed and alias in listed, listed)


def stream(client, name):
    events = list(client.messages.create(model=name, messages=HELLO, max_tokens=6, stream=True))
    kinds = [event.type for event in events]
    once = [kind for kind, before in zip(kinds, [None, *kinds]) if kind != before]
    check("events come in order", once == ORDER, kinds)
    said = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    check("a stream says it all", speaks(name, said), said)
    with client.messages.stream(model=name, messages=HELLO, max_tokens=4) as answer:
        said = "".join(answer.text_stream)
        whole = answer.get_final_message()
    check("a stream is put together", whole.content[0].text == said and whole.usage.output_tokens == 4, whole)


def leaves(client, address, name):
    with client.messages.create(model=name, messages=HELLO, max_tokens=400, stream=True,
                                extra_body={"x_pace_ms": 50}) as answer:
        heard = [event for event, _ in zip(answer, range(3))]
    check("a stream that is closed early was heard up to there", len(heard) == 3)
    check("and leaves the worker free", is_idle(address, name))


def unknown(client, name):
    error = checks.refused("an unknown model", anthropic.NotFoundError,
                           lambda: client.messages.create(model="no-such", messages=HELLO, max_tokens=1))
    check("an unknown model is a NotFoundError", error.type == "not_found_error" and error.body["type"] == "error", error.body)
    check("which has the stable code", error.error_code == "model_not_found", error.body)
    check("and says what there is", "no-such" in error.api_message and name in error.api_message, error.api_message)


def queue_full(client, address):
    answers = []

    def ask():
        answers.append(client.messages.create(model="narrow", messages=HELLO, max_tokens=1, extra_body={"x_delay_ms": 1000}))

    def is_at(**wanted):
        told = state(address, "narrow")
        return all(told[key] == value for key, value in wanted.items())
    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread, wanted in zip(asking, [{"in_flight": 1}, {"in_flight": 1, "queued": 1}]):
        thread.start()
        check(f"the queue is at {wanted}", becomes(lambda: is_at(**wanted)))
    error = checks.refused("a full queue", anthropic.RateLimitError,
                           lambda: client.messages.create(model="narrow", messages=HELLO, max_tokens=1))
    check("a full queue is a RateLimitError", error.type == "rate_limit_error" and error.error_code == "queue_full", error.body)
    for thread in asking:
        thread.join(DEADLINE)
    check("and the others were served", len(answers) == 2)


def broken(client, name):
    heard = []

    def listen():
        for event in client.messages.create(model=name, messages=HELLO, max_tokens=9, stream=True,
                                            extra_body={"x_break_after": 3}):
            heard.append(event.type)
    error = checks.refused("a stream that breaks", anthropic.APIStatusError, listen)
    check("a stream that breaks is an error", error.body["error"]["code"] == "worker_failed", error.body)
    check("after what was heard", heard.count("content_block_delta") == 3 and "message_stop" not in heard, heard)
    error = checks.refused("an error of the worker", anthropic.OverloadedError,
                           lambda: client.messages.create(model=name, messages=HELLO, max_tokens=1, extra_body={"x_status": 529}))
    check("an error of the worker comes as it is", error.body
          == {"type": "error", "error": {"type": "overloaded_error", "message": "as asked"}}, error.body)


def main():
    address, name, alias, *stub = sys.argv[1:]
    with client_of(f"http://{address}") as client:
        messages(client, name, alias)
        stream(client, name)
        leaves(client, address, name)
        unknown(client, name)
        if stub:
            queue_full(client, address)
            broken(client, name)
    with client_of(f"http://{address}/upstream/{alias}") as client:
        answer = client.messages.create(model="whatever", messages=HELLO, max_tokens=2)
        check("a base URL below /upstream names the model", speaks(name, answer.content[0].text), answer)


if __name__ == "__main__":
    main()
