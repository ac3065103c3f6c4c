#!/usr/bin/env python3
"""OpenAI's own Python client, unmodified, through residentd.

    openai_sdk.py ADDRESS MODEL ALIAS [stub] [h2c]

MODEL, also called ALIAS, begins each word it says with its name, as the stub
worker does and what tiny-gguf writes. With `stub` also what only a stub does:
embeddings, responses, uploads, and answers at a pace; a model `narrow` takes
one request and lets one wait. With `h2c` everything goes over HTTP/2.
"""

import asyncio
import io
import sys
import threading

import httpx2
import openai

from checks import DEADLINE, Checks, becomes, is_idle, speaks
from checks import model as state

H2C = "h2c" in sys.argv
checks = Checks("openai (Python, HTTP/2)" if H2C else "openai (Python)")
check = checks.check
HELLO = [{"role": "user", "content": "Hello"}]


def client_of(address, **more):
    settings = {"base_url": f"http://{address}/v1", "api_key": "none", "timeout": DEADLINE, "max_retries": 0}
    if H2C:
        settings["http_client"] = httpx2.Client(http1=False, http2=True)
    return openai.OpenAI(**(settings | more))


def models(client, name, alias):
    listed = [model.id for model in client.models.list()]
    check("models are listed with their aliases", name in listed and alias in listed, listed)
    check("one model is told", client.models.retrieve(alias).id == alias)


def chat(client, name, alias):
    answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=5)
    said = answer.choices[0].message
    check("a chat", said.role == "assistant" and speaks(name, said.content), said)
    check("a chat says what it used", answer.usage.completion_tokens == 5, answer.usage)
    answer = client.chat.completions.create(model=alias, messages=HELLO, max_tokens=3)
    check("a chat by an alias", speaks(name, answer.choices[0].message.content), answer)
    answer = client.completions.create(model=name, prompt="Hello", max_tokens=4)
    check("a completion", speaks(name, answer.choices[0].text), answer)


def stream(client, name):
    chunks = list(client.chat.completions.create(model=name, messages=HELLO, max_tokens=6, stream=True))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    check("a stream says it all", speaks(name, said) and len(said.split()) >= 6, said)
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    check("a stream ends with its reason, and nothing before does", ends[-1] == "length" and not any(ends[:-1]), ends)
    answer = client.completions.create(model=name, prompt="Hello", max_tokens=4, stream=True)
    said = "".join(chunk.choices[0].text for chunk in answer if chunk.choices)
    check("a stream of a completion", speaks(name, said), said)


def leaves(client, address, name):
    """A client that has heard enough closes its stream."""
    answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=400, stream=True,
                                            extra_body={"x_pace_ms": 50})
    heard = [chunk for chunk, _ in zip(answer, range(3))]
    answer.close()
    check("a stream that is closed early was heard up to there", len(heard) == 3)
    check("and leaves the worker free", is_idle(address, name))
    with client.chat.completions.create(model=name, messages=HELLO, max_tokens=2, stream=True) as answer:
        check("and the next stream is heard", any(chunk.choices for chunk in answer))


def unknown(client, name):
    error = checks.refused("an unknown model", openai.NotFoundError,
                           lambda: client.chat.completions.create(model="no-such", messages=HELLO))
    check("an unknown model is a NotFoundError", error.code == "model_not_found" and error.status_code == 404, error.body)
    check("which says what there is", "no-such" in error.message and name in error.message, error.message)
    error = checks.refused("no model", openai.BadRequestError,
                           lambda: client.chat.completions.create(model=None, messages=HELLO))
    check("no model is a BadRequestError", error.code == "bad_request", error.body)
    error = checks.refused("a model that is not listed", openai.NotFoundError, lambda: client.models.retrieve("no-such"))
    check("a model that is not listed is a NotFoundError", error.code == "model_not_found", error.body)


async def side_by_side(address, name):
    transport = httpx2.AsyncClient(http1=not H2C, http2=H2C)
    async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=DEADLINE,
                                  max_retries=0, http_client=transport) as client:
        async def heard():
            answer = await client.chat.completions.create(model=name, messages=HELLO, max_tokens=8, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices])
        said = await asyncio.gather(*(heard() for _ in range(8)))
    check("eight streams side by side", all(speaks(name, text) for text in said), said)


def embeddings(client, name):
    inputs = ["one", "two", "one"]
    # Without a format the client asks for base64 and takes it apart.
    packed = client.embeddings.create(model=name, input=inputs)
    plain = client.embeddings.create(model=name, input=inputs, encoding_format="float")
    check("embeddings keep their order", [one.index for one in packed.data] == [0, 1, 2])
    first, second, third = (one.embedding for one in packed.data)
    check("embeddings tell texts apart", first == third and first != second)
    near = all(abs(a - b) < 1e-6 for p, q in zip(packed.data, plain.data) for a, b in zip(p.embedding, q.embedding))
    check("embeddings are the same in either format", near and len(first) == len(plain.data[0].embedding) == 8)


def responses(client, name):
    answer = client.responses.create(model=name, input="Hello", max_output_tokens=4)
    check("a response", answer.status == "completed" and speaks(name, answer.output_text), answer.output_text)
    events = list(client.responses.create(model=name, input="Hello", max_output_tokens=4, stream=True))
    numbers = [event.sequence_number for event in events]
    check("a response comes in order", numbers == list(range(len(events))), numbers)
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    check("and says at its end what it said", last.type == "response.completed" and last.response.output_text == said, said)


def uploads(client, name):
    audio = bytes(range(256)) * 200
    answer = client.audio.transcriptions.create(model=name, file=("speech.wav", io.BytesIO(audio), "audio/wav"))
    length = int(answer.text.split("bytes=")[1].split()[0])
    check("an upload of audio reaches its model whole", speaks(name, answer.text) and length > len(audio), answer.text)
    error = checks.refused("an upload to an unknown model", openai.NotFoundError,
                           lambda: client.audio.transcriptions.create(model="no-such", file=("a.wav", audio)))
    check("an upload to an unknown model is a NotFoundError", error.code == "model_not_found", error.body)


def queue_full(client, address):
    """`narrow` is busy and one waits: whoever comes then is turned away."""
    slow = {"x_delay_ms": 1500}
    answers = []

    def ask():
        answers.append(client.chat.completions.create(model="narrow", messages=HELLO, max_tokens=1, extra_body=slow))

    def is_at(**wanted):
        told = state(address, "narrow")
        return all(told[key] == value for key, value in wanted.items())
    asking = [threading.Thread(target=ask) for _ in range(2)]
    asking[0].start()
    check("one request is in", becomes(lambda: is_at(in_flight=1)))
    asking[1].start()
    check("and one waits", becomes(lambda: is_at(in_flight=1, queued=1)))
    error = checks.refused("a full queue", openai.RateLimitError,
                           lambda: client.chat.completions.create(model="narrow", messages=HELLO))
    check("a full queue is a RateLimitError", error.code == "queue_full" and "narrow" in error.message, error.body)
    check("which says when to come back", int(error.response.headers["retry-after"]) >= 1)
    patient = client.with_options(max_retries=5)
    answer = patient.chat.completions.create(model="narrow", messages=HELLO, max_tokens=1)
    check("a client that tries again by itself is served", speaks("narrow", answer.choices[0].message.content))
    for thread in asking:
        thread.join(DEADLINE)
    check("and so were the others", len(answers) == 2)


def broken(client, name):
    """A worker that breaks in mid-answer is an error, never an end."""
    heard = []

    def listen():
        for chunk in client.chat.completions.create(model=name, messages=HELLO, max_tokens=9, stream=True,
                                                    extra_body={"x_break_after": 3}):
            heard.append(chunk)
    error = checks.refused("a stream that breaks", openai.APIError, listen)
    check("a stream that breaks is an APIError", error.code == "worker_failed" and len(heard) == 3, error)
    error = checks.refused("an error of the worker", openai.InternalServerError,
                           lambda: client.chat.completions.create(model=name, messages=HELLO, extra_body={"x_status": 500}))
    check("an error of the worker comes as it is", "as asked" in error.message and error.type == "stub", error.body)


def main():
    address, name, alias, *more = sys.argv[1:]
    with client_of(address) as client:
        models(client, name, alias)
        chat(client, name, alias)
        stream(client, name)
        leaves(client, address, name)
        unknown(client, name)
        asyncio.run(side_by_side(address, name))
        if "stub" in more:
            embeddings(client, name)
            responses(client, name)
            uploads(client, name)
            queue_full(client, address)
            broken(client, name)
    with client_of(address, base_url=f"http://{address}/upstream/{alias}/v1") as client:
        answer = client.chat.completions.create(model="whatever", messages=HELLO, max_tokens=2)
        check("a base URL below /upstream names the model", speaks(name, answer.choices[0].message.content), answer)


if __name__ == "__main__":
    main()
