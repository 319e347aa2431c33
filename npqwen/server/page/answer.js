// An answer as it streams: applies the chunks of a stream to a message of conversations.js.

import { chunks, request, ServerError } from "./stream.js";

const MOST_RETURNS = 3; // consecutive attempts to resume a stream without receiving an event
const PAUSE = 1000; // milliseconds before each
// Firefox and Safari close connections before they fire "pagehide": milliseconds to wait for that event when a
// connection breaks, after "beforeunload" (which also precedes a download) and without it (Safari on iOS has none).
const LEAVING = { announced: 10000, unannounced: 300 };

export function emptyAnswer(model) {
  return {
    role: "assistant", content: "", reasoning: "", calls: [], finish: null, error: null, model, usage: null,
    speed: null, times: {}, stream: null,
  };
}

export class Answer {
  // conversation, message: what the answer belongs to. onchange(urgent) is called whenever the message has changed;
  // urgent: save at once, and return a promise of that, because resuming after a reload depends on it.
  constructor(conversation, message, onchange) {
    this.conversation = conversation;
    this.message = message;
    this.progress = null; // of prefill: {done, total, cached} in tokens, or null
    this.pieces = 0; // chunks with text so far: about one token each
    this.left = false;
    this.patience = LEAVING.unannounced;
    this.error = null; // the ServerError that ended it
    this.controller = new AbortController();
    this.onchange = onchange;
  }

  // Also ends the stream on the server, which would keep it for a page that reconnects.
  stop() {
    this.controller.abort();
    const { stream } = this.message;
    if (stream) request(streamPath(stream), { key: this.key, method: "DELETE" }).catch(() => {});
  }

  // The page may be closed: a connection that breaks then is no error of the server's.
  expectLeaving() {
    this.patience = LEAVING.announced;
  }

  // The page is being closed, or kept for the "back" button: ends the connection, and leaves the answer unfinished.
  leave() {
    this.left = true;
    this.controller.abort();
  }

  // Runs until the answer ends, for whatever reason; never throws.
  async run(body, key) {
    this.key = key;
    this.started = performance.now();
    const { signal } = this.controller;
    await this.finish(async () => {
      const response = await request("v1/chat/completions", { key, body, signal, resumable: true });
      const id = response.headers.get("X-Stream-Id");
      if (id) {
        this.message.stream = { id, next: 0 };
        await this.onchange(true);
      }
      return response;
    });
  }

  // Continues the stream of a message that was still arriving when the page was closed. Runs until the answer is
  // complete; if the server no longer keeps the stream, the message stays as it is.
  async resume(key) {
    this.key = key;
    const { times, stream } = this.message;
    this.started = performance.now() - (times.last ?? 0);
    this.pieces = stream.next;
    let response;
    try {
      response = await this.rest();
    } catch (error) {
      if (this.left) return;
      if (error.name === "AbortError") this.message.finish = "stopped";
      if (error.name === "AbortError" || error.status === 404 || error.status === 410) this.message.stream = null;
      return;
    }
    await this.finish(() => response);
  }

  // Requests the rest of the stream.
  rest() {
    const { stream } = this.message;
    return request(`${streamPath(stream)}?from=${stream.next}`, { key: this.key, signal: this.controller.signal });
  }

  // Reads the response that open() returns; if the stream's connection breaks, reconnects for the rest.
  async finish(open) {
    const { message } = this;
    try {
      for (let failures = 0; ; ) {
        const before = message.stream?.next;
        try {
          await this.read(await open());
          break;
        } catch (error) {
          if (message.stream?.next !== before) failures = 0;
          if (this.left || !error.lost || !message.stream || ++failures > MOST_RETURNS) throw error;
        }
        await pause(PAUSE);
        open = () => this.rest();
      }
    } catch (error) {
      if (error.lost) await pause(this.patience);
      if (this.left) return;
      if (error.name === "AbortError") message.finish = "stopped";
      else {
        this.error = error instanceof ServerError ? error : new ServerError(`This page has a bug: ${error.message}`);
        message.error = this.error.message;
        message.finish = "error";
      }
    }
    message.stream = null;
    // An incomplete call is useless, and no server would accept it in a request.
    if (message.finish !== "tool_calls") message.calls = message.calls.filter((call) => isObject(call.arguments));
  }

  async read(response) {
    for await (const { chunk, id } of chunks(response)) {
      this.apply(chunk);
      if (id !== null && this.message.stream) this.message.stream.next = id + 1;
      this.onchange(false);
    }
    if (this.message.finish === null)
      throw new ServerError("The connection ended before the answer did.", { lost: true });
  }

  apply(chunk) {
    const { message } = this;
    const progress = chunk.prompt_progress;
    if (progress) this.progress = { done: progress.processed, total: progress.total, cached: progress.cache };
    if (chunk.timings) message.speed = chunk.timings.predicted_per_second;
    if (chunk.usage) message.usage = usageOf(chunk.usage);
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? {};
    if (content || reasoning || calls?.length) this.clock(Boolean(reasoning));
    if (reasoning) message.reasoning += reasoning;
    if (content) message.content += content;
    for (const { index = 0, id, function: called } of calls ?? []) {
      const call = (message.calls[index] ??= { id: "", name: "", arguments: "" });
      if (id) call.id = id;
      call.name += called?.name ?? "";
      call.arguments += called?.arguments ?? "";
    }
    if (choice.finish_reason) message.finish = choice.finish_reason;
  }

  clock(thinking) {
    const { times, reasoning } = this.message;
    const now = performance.now() - this.started;
    times.first ??= now;
    if (reasoning && !thinking) times.thought ??= now;
    times.last = now;
    this.pieces++;
    this.progress = null;
  }
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function streamPath({ id }) {
  return `v1/streams/${encodeURIComponent(id)}`;
}

function isObject(text) {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}

function usageOf(usage) {
  return {
    prompt: usage.prompt_tokens ?? 0,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    completion: usage.completion_tokens ?? 0,
    reasoning: usage.completion_tokens_details?.reasoning_tokens ?? 0,
  };
}

const SHORTEST = 50; // milliseconds; shorter times are too short to measure speed

// Tokens per second after the first one, or null if it cannot be measured.
export function speed(tokens, { first, last }) {
  return tokens > 1 && last - first > SHORTEST ? ((tokens - 1) / (last - first)) * 1000 : null;
}
