// Conversations as data: trees of messages, of which one path is shown. Editing and retrying add branches.
//
// A conversation is {id, title, created, updated, settings, messages, head}; messages lists all of them in the order
// of creation, head is the id of the last one shown. A message is {id, parent, role, content, created}, and by role
//   assistant: reasoning, calls: [{id, name, arguments}], finish: why it ended, or null while it streams; error, model,
//     usage: {prompt, cached, completion, reasoning} in tokens, speed: tokens per second as the server measured it, or
//     null, times: {first, thought, last} in ms since the request, stream: while it streams, {id, next}, the server's
//     id of the stream and the number of the next event, or null
//   tool: call, the id of the call that it answers

const TITLE = 60; // characters

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(settings) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: { ...settings }, messages: [], head: null };
}

// Changes a conversation to what another tab has saved. What that tab did not know stays: messages of this one, and
// answers with more text here. So does the path on the screen while an answer, `running`, comes here. Messages stay the
// same objects, as views refer to them. Returns whether the conversation now has something that is not saved.
export function adopt(conversation, saved, running) {
  const head = running ? conversation.head : saved.head;
  const own = new Map(conversation.messages.map((message) => [message.id, message]));
  let newer = false;
  const messages = saved.messages.map((message) => {
    const known = own.get(message.id);
    own.delete(message.id);
    if (!known) return message;
    if (known !== running && lengthOf(known) <= lengthOf(message)) return Object.assign(known, message);
    newer = true;
    return known;
  });
  Object.assign(conversation, saved, { messages: [...messages, ...own.values()], head });
  return newer || own.size > 0;
}

// Replaces a message of the conversation with another copy of it if that has more text. Returns whether it has.
export function restore(conversation, message) {
  const known = conversation.messages.find(({ id }) => id === message.id);
  const more = known !== undefined && lengthOf(message) > lengthOf(known);
  if (more) Object.assign(known, message);
  return more;
}

function lengthOf({ content, reasoning = "" }) {
  return content.length + reasoning.length;
}

// Adds a message below the parent, and shows it.
export function append(conversation, parent, fields) {
  const message = { id: newId(), parent, created: Date.now(), ...fields };
  conversation.messages.push(message);
  conversation.head = message.id;
  conversation.updated = message.created;
  if (!conversation.title && message.role === "user") conversation.title = titleOf(message.content);
  return message;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  const start = Array.from(line.slice(0, 2 * TITLE)).slice(0, TITLE).join("");
  return start.length < line.length ? `${start.trimEnd()}…` : line;
}

// The messages that are shown, first to last.
export function path(conversation) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const found = [];
  for (let message = byId.get(conversation.head); message; message = byId.get(message.parent)) found.unshift(message);
  return found;
}

// All versions of a message, itself included.
export function versions(conversation, message) {
  return conversation.messages.filter((other) => other.parent === message.parent && other.role === message.role);
}

// Shows a version of a message, and the newest of the messages below it.
export function select(conversation, message) {
  let last = message;
  for (let next = last; next; next = conversation.messages.findLast((other) => other.parent === last.id)) last = next;
  conversation.head = last.id;
}

// The messages of a path in the API's format. Answers that failed before their first word are left out.
export function request(conversation, messages) {
  const { system } = conversation.settings;
  const sent = system?.trim() ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    const { role, content } = message;
    if (role === "user") sent.push({ role, content });
    else if (role === "tool") sent.push({ role, content, tool_call_id: message.call });
    else if (content || message.reasoning || message.calls.length) {
      const one = { role, content };
      if (message.reasoning) one.reasoning_content = message.reasoning;
      if (message.calls.length)
        one.tool_calls = message.calls.map((call) => ({
          id: call.id,
          type: "function",
          function: { name: call.name, arguments: call.arguments },
        }));
      sent.push(one);
    }
  }
  return sent;
}

export function exported(conversations) {
  return JSON.stringify({ format: "npqwen conversations", version: 1, conversations }, null, 1);
}

// The conversations of an exported file, with new ids, so that they replace no others. Throws an Error with a message
// for the user if the file is anything else.
export function imported(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("it is not a JSON file");
  }
  if (file?.format !== "npqwen conversations" || !Array.isArray(file.conversations))
    throw new Error("it does not contain conversations exported from this page");
  return file.conversations.map(checked);
}

function checked(source) {
  if (!Array.isArray(source?.messages)) throw new Error("a conversation in it has no messages");
  const ids = new Set();
  const messages = source.messages.map((message) => {
    const { id, parent, role, content } = message ?? {};
    if (!["user", "assistant", "tool"].includes(role) || typeof content !== "string" || typeof id !== "string")
      throw new Error("a message in it is incomplete");
    if (ids.has(id) || (parent !== null && !ids.has(parent))) throw new Error("its messages are out of order");
    ids.add(id);
    const one = { id, parent, role, content, created: whole(message.created) ?? Date.now() };
    if (role === "tool") one.call = String(message.call);
    return role === "assistant" ? { ...one, ...checkedAnswer(message) } : one;
  });
  return {
    id: newId(),
    title: typeof source.title === "string" ? source.title.slice(0, 200) : "",
    created: whole(source.created) ?? Date.now(),
    updated: whole(source.updated) ?? Date.now(),
    settings: plainValues(source.settings),
    messages,
    head: ids.has(source.head) ? source.head : (messages.at(-1)?.id ?? null),
  };
}

function checkedAnswer(message) {
  const calls = Array.isArray(message.calls) ? message.calls : [];
  return {
    reasoning: typeof message.reasoning === "string" ? message.reasoning : "",
    calls: calls.map((call) => ({
      id: String(call?.id),
      name: String(call?.name),
      arguments: String(call?.arguments),
    })),
    finish: typeof message.finish === "string" ? message.finish : null,
    error: typeof message.error === "string" ? message.error : null,
    model: typeof message.model === "string" ? message.model : "",
    usage: message.usage ? checkedUsage(message.usage) : null,
    speed: Number.isFinite(message.speed) ? message.speed : null,
    times: numbers(message.times),
  };
}

function checkedUsage(usage) {
  return { prompt: 0, cached: 0, completion: 0, reasoning: 0, ...numbers(usage) };
}

function whole(value) {
  return Number.isSafeInteger(value) ? value : null;
}

function numbers(object) {
  return Object.fromEntries(Object.entries(object ?? {}).filter(([, value]) => Number.isFinite(value)));
}

function plainValues(object) {
  const values = Object.entries(object ?? {}).filter(([, value]) => ["string", "number"].includes(typeof value));
  return Object.fromEntries(values);
}
