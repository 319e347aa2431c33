// Requests to this server's OpenAI API.

// An error, described in one line. status: the HTTP status, or 0. retryAfter: seconds to wait before a retry, as the
// server requests, or null. lost: the connection failed, not the answer.
export class ServerError extends Error {
  constructor(message, { status = 0, retryAfter = null, lost = false } = {}) {
    super(message);
    this.lost = lost;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// Sends a request; path is relative to the page. resumable: request a resumable stream. Returns the response if it is
// successful, or throws a ServerError. A cancelled request throws AbortError.
export async function request(path, { key = "", body, signal, resumable = false, method } = {}) {
  const headers = {};
  if (resumable) headers["X-Resumable"] = "true";
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      keepalive: method === "DELETE", // sent even if the page is being closed
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it running?", { lost: true });
  }
  if (response.ok) return response;
  const retryAfter = Number.parseInt(response.headers.get("Retry-After"), 10);
  throw new ServerError(await reason(response), {
    status: response.status,
    retryAfter: Number.isFinite(retryAfter) ? Math.min(Math.max(retryAfter, 1), 600) : null,
  });
}

async function reason(response) {
  const text = (await response.text().catch(() => "")).trim();
  try {
    const { error } = JSON.parse(text);
    const message = typeof error === "string" ? error : error?.message;
    if (typeof message === "string" && message) return message;
  } catch {
    // not JSON: a proxy's page
  }
  return `The server answered ${response.status} ${response.statusText}`.trim();
}

// The models on offer that converse, not those for embeddings: [{id, context}], context in tokens or null.
export async function models(key) {
  const response = await request("v1/models", { key });
  const { data } = await response.json();
  const conversing = data.filter(({ capabilities }) => capabilities?.includes("completion") ?? true);
  return conversing.map((model) => ({ id: String(model.id), context: contextOf(model) }));
}

function contextOf(model) {
  const length = model.context_length ?? model.max_model_len ?? model.meta?.n_ctx;
  return Number.isFinite(length) ? length : null;
}

// The chunks of a streamed answer, as {chunk, id}: id is the event's number, or null if the stream is not resumable.
// Throws a ServerError for an error in the stream, and if the connection is lost.
export async function* chunks(response) {
  for await (const { data, id } of events(response.body)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ServerError("The server sent something that is not JSON.");
    }
    if (chunk.error) throw new ServerError(String(chunk.error.message ?? chunk.error));
    yield { chunk, id };
  }
}

// Server-sent events in a stream of bytes: {data, id}, the data as text, the id as a number, or null without one.
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  let id = null;
  try {
    for (let done = false; !done; ) {
      const piece = await readPiece(reader);
      done = piece.done;
      rest += done ? decoder.decode() : decoder.decode(piece.value, { stream: true });
      // A "\r" at the end may be the first half of "\r\n".
      const lines = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line.startsWith("id:")) id = Number.parseInt(line.slice(3), 10);
        else if (line === "" && data.length) {
          yield { data: data.join("\n"), id };
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function readPiece(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server was lost.", { lost: true });
  }
}
