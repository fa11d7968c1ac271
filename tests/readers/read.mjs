// What three readers of server-sent events find in streams that are cut as stdin says.
//
// stdin: a list of streams, each a list of chunks in base64. stdout: for each reader and stream the
// list of [id, type, data].
import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

import { EventSource } from "eventsource";
import { createParser } from "eventsource-parser";

// Made for bundlers: its module cannot be imported by node. It looks whether its page is hidden.
const { fetchEventSource } = createRequire(import.meta.url)("@microsoft/fetch-event-source");
globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };
globalThis.window = globalThis;

const ADDRESS = "http://127.0.0.1/";

function answering(chunks) {
  const body = new ReadableStream({
    start(stream) {
      for (const chunk of chunks) stream.enqueue(new Uint8Array(chunk));
      stream.close();
    },
  });
  return async () => new Response(body, { headers: { "content-type": "text/event-stream" } });
}

const READERS = {
  "eventsource-parser": async (chunks) => {
    const found = [];
    const decoder = new TextDecoder();
    const parser = createParser({
      onEvent: (message) => found.push([message.id, message.event, message.data]),
    });
    for (const chunk of chunks) parser.feed(decoder.decode(chunk, { stream: true }));
    return found;
  },
  "fetch-event-source": async (chunks) => {
    const found = [];
    await fetchEventSource(ADDRESS, {
      fetch: answering(chunks),
      openWhenHidden: true,
      // It also tells of the first frame, which has no data and is no message.
      onmessage: (message) => message.data && found.push([message.id, message.event, message.data]),
    });
    return found;
  },
  eventsource: (chunks) =>
    new Promise((done) => {
      const found = [];
      const source = new EventSource(ADDRESS, { fetch: answering(chunks) });
      for (const type of ["RunStarted", "StepStarted", "DebugTrace", "StepFinished", "RunFinished"])
        source.addEventListener(type, (message) => {
          found.push([message.lastEventId, message.type, message.data]);
          if (type !== "RunFinished") return;
          source.close();
          done(found);
        });
    }),
};

const streams = JSON.parse(await text(process.stdin));
const found = {};
for (const [name, read] of Object.entries(READERS)) {
  found[name] = [];
  for (const chunks of streams)
    found[name].push(await read(chunks.map((chunk) => Buffer.from(chunk, "base64"))));
}
process.stdout.write(JSON.stringify(found));
