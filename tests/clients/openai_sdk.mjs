// OpenAI's own client for Node, unmodified, through residentd.
//
//     node openai_sdk.mjs ADDRESS MODEL ALIAS [stub]
//
// MODEL, also called ALIAS, begins each word it says with its name. With `stub` also what only a stub does.

import OpenAI, { toFile } from "openai";

const [address, name, alias, stub] = process.argv.slice(2);
const DEADLINE = 30_000;
const client = new OpenAI({ baseURL: `http://${address}/v1`, apiKey: "none", timeout: DEADLINE, maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];

function check(what, isSo, seen) {
    if (!isSo) {
        console.error(`openai (Node): ${what}: NOT so: ${JSON.stringify(seen)}`);
        process.exit(1);
    }
    console.log(`openai (Node): ${what}`);
}

async function refused(what, kind, ask) {
    try {
        await ask();
    } catch (error) {
        check(`${what} is a ${kind.name}`, error instanceof kind, `${error}`);
        return error;
    }
    check(`${what} is refused`, false);
}

function speaks(text) {
    const words = text.split(/\s+/).filter((word) => word && !/^(pid|model|bytes|checksum)=/.test(word));
    return words.length > 0 && words.every((word) => word.startsWith(name));
}

async function isIdle() {
    for (const end = Date.now() + DEADLINE; Date.now() < end;) {
        const told = await (await fetch(`http://${address}/api/v1/models/${name}`)).json();
        if (told.data.in_flight === 0) return true;
        await new Promise((resolve) => setTimeout(resolve, 20));
    }
    return false;
}

const listed = [];
for await (const model of client.models.list()) listed.push(model.id);
check("models are listed", listed.includes(name) && listed.includes(alias), listed);
check("one model is told", (await client.models.retrieve(alias)).id === alias);

const chat = await client.chat.completions.create({ model: name, messages, max_tokens: 5 });
check("a chat", speaks(chat.choices[0].message.content) && chat.usage.completion_tokens === 5, chat);
const other = await client.chat.completions.create({ model: alias, messages, max_tokens: 2 });
check("a chat by an alias", speaks(other.choices[0].message.content), other);

let said = "";
const reasons = [];
for await (const chunk of await client.chat.completions.create({ model: name, messages, max_tokens: 6, stream: true })) {
    if (!chunk.choices.length) continue;
    said += chunk.choices[0].delta.content ?? "";
    reasons.push(chunk.choices[0].finish_reason ?? null);
}
check("a stream says it all", speaks(said), said);
check("and ends with its reason", reasons.pop() === "length" && reasons.every((reason) => reason === null), reasons);

let heard = 0;
const long = await client.chat.completions.create({ model: name, messages, max_tokens: 400, stream: true, x_pace_ms: 50 });
for await (const _ of long) if (++heard === 3) break;
check("a stream that is left early leaves the worker free", heard === 3 && (await isIdle()), heard);

const error = await refused("an unknown model", OpenAI.NotFoundError, () =>
    client.chat.completions.create({ model: "no-such", messages }));
check("which says what there is", error.code === "model_not_found" && error.message.includes(name), error.message);

if (stub) {
    const input = ["one", "two", "one"];
    const packed = await client.embeddings.create({ model: name, input });
    const plain = await client.embeddings.create({ model: name, input, encoding_format: "float" });
    const near = packed.data.every(({ embedding }, at) =>
        embedding.length === 8 && embedding.every((value, axis) => Math.abs(value - plain.data[at].embedding[axis]) < 1e-6));
    check("embeddings are the same in either format", packed.data.length === 3 && near, packed);

    let text = "";
    let last;
    for await (const event of await client.responses.create({ model: name, input: "Hello", max_output_tokens: 4, stream: true })) {
        if (event.type === "response.output_text.delta") text += event.delta;
        last = event;
    }
    const done = last.type === "response.completed" && last.response.output[0].content[0].text === text;
    check("a response comes in events", speaks(text) && done, last);

    // The file stands before the model's name in the form.
    const file = await toFile(Buffer.alloc(100_000, 7), "speech.wav");
    const written = await client.audio.transcriptions.create({ file, model: name });
    check("an upload of audio reaches its model whole", speaks(written.text) && /bytes=1\d{5}/.test(written.text), written);
    const lost = await refused("an upload to an unknown model", OpenAI.NotFoundError, async () =>
        client.audio.transcriptions.create({ file: await toFile(Buffer.alloc(1000), "a.wav"), model: "no-such" }));
    check("an upload to an unknown model has the code", lost.code === "model_not_found", lost.error);

    // The worker says three words and breaks off.
    let before = 0;
    const broke = await refused("a stream that breaks", OpenAI.APIError, async () => {
        const broken = await client.chat.completions.create({ model: name, messages, max_tokens: 9, stream: true, x_break_after: 3 });
        for await (const _ of broken) before++;
    });
    check("after what was heard", before === 3 && broke.code === "worker_failed", [before, broke.message]);

    const slow = (x_delay_ms) => client.chat.completions.create({ model: "narrow", messages, max_tokens: 1, x_delay_ms });
    const answers = await Promise.allSettled([slow(800), slow(800), slow(800), slow(800)]);
    const turnedAway = answers.filter(({ reason }) => reason instanceof OpenAI.RateLimitError && reason.code === "queue_full");
    const served = answers.filter(({ status }) => status === "fulfilled");
    check("of four at once one is served, one waits, and two meet a RateLimitError",
        turnedAway.length === 2 && served.length === 2, answers.map(({ reason }) => `${reason}`));
}
