// The page: what its parts show, and how it handles the user's actions.

import { Answer, emptyAnswer } from "./answer.js";
import { drawContext } from "./context_meter.js";
import * as conversations from "./conversations.js";
import { element, isComposing } from "./dom.js";
import { Menu } from "./menu.js";
import { keyForm, messageView, WRONG_KEY } from "./message_view.js";
import { Retries } from "./retries.js";
import { defaults, requestFields, SettingsDialog } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { alone, HAS_LOCKS, remember, remembered, rememberLast, Storage, takeLast } from "./storage.js";
import { models, ServerError } from "./stream.js";

const NEAR_END = 48; // pixels from the end of the conversation within which the view counts as at the end

const $ = (id) => document.getElementById(id);
const transcript = $("transcript");
const input = $("input");

const storage = new Storage(otherTab);
const all = new Map(); // conversations by id; one without messages is not saved
const answers = new Map(); // running Answers by the conversation's id
const others = new Map(); // unfinished answers by the message's id: true if another tab receives them
const retries = new Retries(drawSoon); // of answers, by the message's id
let current = conversations.newConversation(defaults());
let views = []; // of the messages on the screen
let offered = []; // models
let key = remembered("key", "");
let atEnd = true;
let frame = 0;

const menu = new Menu($("menu"), $("shade"));
const settings = new SettingsDialog($("settings"), { onchange: changeSettings, onkey: useKey });
const sidebar = new Sidebar($("list"), $("search"), {
  open: (id) => open(all.get(id)),
  rename(id, title) {
    all.get(id).title = title;
    save(all.get(id));
  },
  remove,
  save: (id) => download([all.get(id)]),
});
const actions = {
  edit(message, text) {
    stop(); // an answer to what was there before
    conversations.append(current, message.parent, { role: "user", content: text });
    ask();
  },
  retry,
  proceed(message) {
    if (!answers.has(current.id)) ask(message);
  },
  wait(message) {
    retries.forget(message.id);
    draw();
  },
  select(message, label) {
    conversations.select(current, message);
    save(current);
    draw();
    const { element } = views.find((view) => view.message === message);
    const button = ".versions button:enabled";
    (element.querySelector(`${button}[aria-label="${label}"]`) ?? element.querySelector(button)).focus();
  },
  results(message, texts) {
    if (answers.has(current.id)) return;
    message.calls.forEach(({ id }, i) =>
      conversations.append(current, i ? current.head : message.id, { role: "tool", call: id, content: texts[i] }));
    ask();
  },
  useKey(value, message) {
    useKey(value);
    retry(message);
  },
  versions: (message) => conversations.versions(current, message),
  needsKey: (message) => message.status === 401,
};

// Asking and answering

function send() {
  const text = input.value.trim();
  if (!text || answers.has(current.id)) return;
  input.value = "";
  grow();
  conversations.append(current, current.head, { role: "user", content: text });
  ask();
}

// Has the model answer the last message on the screen. unfinished: the answer there, to which the model adds the rest.
async function ask(unfinished = null, attempt = 0) {
  const conversation = current;
  const path = conversations.path(conversation);
  const model = modelOf(conversation);
  const message = unfinished ?? conversations.append(conversation, conversation.head, emptyAnswer(model));
  const { content, reasoning, times } = message;
  Object.assign(message, emptyAnswer(model), { content, reasoning, status: 0 });
  if (times.thought) message.times.thought = times.thought;
  all.set(conversation.id, conversation);
  conversation.updated = Date.now();
  let body;
  try {
    body = { model, messages: conversations.request(conversation, path), stream: true,
      stream_options: { include_usage: true }, return_progress: true, ...requestFields(conversation.settings) };
  } catch (error) {
    Object.assign(message, { error: error.message, finish: "error" });
    save(conversation);
    draw();
    return;
  }
  atEnd = true;
  const answer = begin(conversation, message);
  await alone(message.id, () => follow(answer, () => answer.run(body, key)));
  if (answer.error?.retryAfter)
    retries.start(message.id, answer.error.retryAfter, attempt, (next) => {
      const shown = conversation === current && conversation.head === message.id;
      if (shown && !answers.has(conversation.id)) ask(message, next);
    });
  if (conversation === current) draw();
}

// Shows that a message is about to arrive.
function begin(conversation, message) {
  const answer = new Answer(conversation, message, (urgent) => {
    if (conversation === current) drawSoon();
    if (!all.has(conversation.id)) return; // deleted
    if (urgent) return storage.put(conversation).catch(() => {});
    storage.putSoon(conversation);
  });
  answers.set(conversation.id, answer);
  draw();
  return answer;
}

// Shows and saves an answer as it streams, until run() ends.
async function follow(answer, run) {
  const { conversation, message } = answer;
  await save(conversation);
  await run();
  if (answers.get(conversation.id) === answer) answers.delete(conversation.id);
  if (answer.left) return; // at once: nothing runs for long after "pagehide", and another tab waits for the lock
  message.status = answer.error?.status ?? 0;
  await save(conversation);
  if (conversation === current) draw();
  else drawSidebar();
}

// Continues the conversation's unfinished answers once no other tab receives them.
function takeUp({ id, messages }) {
  for (const message of messages) {
    if (message.finish !== null || others.has(message.id) || answers.get(id)?.message === message) continue;
    others.set(message.id, false);
    const held = () => {
      others.set(message.id, true);
      drawSoon();
    };
    alone(message.id, () => resume(id, message.id), held).finally(() => {
      others.delete(message.id);
      drawSoon();
    });
  }
}

async function resume(id, messageId) {
  const conversation = all.get(id);
  const message = conversation?.messages.find((one) => one.id === messageId);
  if (!message?.stream || answers.has(id)) return;
  const answer = begin(conversation, message);
  await follow(answer, () => answer.resume(key));
}

function retry(message) {
  retries.forget(message.id);
  if (answers.has(current.id)) return;
  const begun = message.content || message.reasoning || message.calls.length;
  const last = message.id === current.head;
  if (!begun && last) ask(message);
  else {
    current.head = message.parent;
    ask();
  }
}

function stop() {
  answers.get(current.id)?.stop();
}

// Conversations

function open(conversation) {
  current = conversation;
  menu.close();
  views = [];
  transcript.replaceChildren();
  atEnd = true;
  draw();
  input.focus();
}

function newChat() {
  open(conversations.newConversation(defaults()));
}

async function save(conversation) {
  drawSidebar();
  if (!all.has(conversation.id)) return;
  try {
    await storage.put(conversation);
  } catch (error) {
    notice(`This conversation could not be saved (${error.message}).`);
  }
}

async function remove(id) {
  answers.get(id)?.stop();
  all.delete(id);
  if (current.id === id) newChat();
  drawSidebar();
  await storage.delete(id);
}

async function otherTab(id) {
  const saved = await storage.get(id);
  const known = all.get(id);
  const running = answers.get(id)?.message;
  if (!saved) {
    answers.get(id)?.stop();
    all.delete(id);
    storage.forget(id);
  } else if (!known) all.set(id, saved);
  else if (conversations.adopt(known, saved, running)) storage.putSoon(known);
  if (saved && HAS_LOCKS) takeUp(all.get(id));
  if (current.id !== id) drawSidebar();
  else if (saved) draw();
  else newChat();
}

function download(chosen) {
  const name = chosen.length === 1 ? chosen[0].title.replace(/[^\p{L}\p{N} _-]/gu, "").trim() || "chat" : "npqwen chats";
  const url = URL.createObjectURL(new Blob([conversations.exported(chosen)], { type: "application/json" }));
  element("a", { href: url, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function importFile(file) {
  let found;
  try {
    found = conversations.imported(await file.text());
  } catch (error) {
    notice(`${file.name} cannot be imported: ${error.message}.`);
    return;
  }
  for (const conversation of found) {
    all.set(conversation.id, conversation);
    await save(conversation);
  }
  notice("");
  if (found.length) open(found[0]);
}

function changeSettings(values) {
  const { model } = current.settings;
  current.settings = model ? { ...values, model } : values;
  if (all.has(current.id)) storage.putSoon(current);
}

// Models and the key

async function loadModels() {
  try {
    offered = await models(key);
    notice(offered.length ? "" : "This server has no model for conversations.");
  } catch (error) {
    offered = [];
    const wantsKey = error instanceof ServerError && error.status === 401;
    if (wantsKey) notice(key ? WRONG_KEY : "This server needs an API key.", keyForm(useKey));
    else notice(error.message, element("button", { type: "button", onclick: loadModels }, "Retry"));
    if (wantsKey && !input.value) $("notice").querySelector("input").focus();
  }
  drawModels();
}

function useKey(value) {
  key = value;
  remember("key", key);
  return loadModels();
}

function modelOf(conversation) {
  const { model } = conversation.settings;
  return offered.some(({ id }) => id === model) ? model : (offered[0]?.id ?? model ?? "");
}

// Drawing

function drawSoon() {
  frame ||= requestAnimationFrame(draw);
}

function draw() {
  cancelAnimationFrame(frame);
  frame = 0;
  const path = conversations.path(current);
  let same = 0;
  while (same < path.length && views[same]?.message === path[same]) same++;
  for (const view of views.splice(same)) view.element.remove();
  for (const message of path.slice(same)) {
    const view = messageView(message, actions);
    views.push(view);
    transcript.append(view.element);
  }
  const answer = answers.get(current.id) ?? null;
  views.forEach((view, i) =>
    view.update({
      answer: answer?.message === view.message ? answer : null,
      elsewhere: others.get(view.message.id) ?? false,
      waiting: retries.left(view.message.id),
      showThinking: settings.showThinking,
      last: i === views.length - 1,
    }));
  $("welcome").hidden = path.length > 0;
  $("send").hidden = answer !== null;
  $("stop").hidden = answer === null;
  if (atEnd) transcript.scrollTop = transcript.scrollHeight;
  drawUsed();
  drawSidebar();
  drawModels();
}

function drawSidebar() {
  const place = all.has(current.id) ? `#${current.id}` : "";
  if (location.hash !== place) history.replaceState(null, "", place || location.pathname);
  const newest = [...all.values()].sort((a, b) => b.updated - a.updated);
  const running = [...answers.keys()];
  const state = JSON.stringify([newest.map(({ id, title }) => [id, title]), current.id, running]);
  if (state === drawSidebar.state) return;
  drawSidebar.state = state;
  sidebar.update(newest, current.id, new Set(running));
  document.title = current.title ? `${current.title} – npqwen` : "npqwen";
}

function drawModels() {
  const select = $("model");
  const state = JSON.stringify([offered, modelOf(current)]);
  if (state === drawModels.state) return;
  drawModels.state = state;
  select.replaceChildren(...offered.map(({ id }) => element("option", { value: id }, id)));
  select.value = modelOf(current);
  select.disabled = select.hidden = offered.length === 0;
  $("welcome-model").textContent = modelOf(current);
  drawUsed();
}

function drawUsed() {
  const context = offered.find(({ id }) => id === modelOf(current))?.context ?? null;
  drawContext($("context"), conversations.path(current), context);
}

function notice(text, ...more) {
  $("notice").replaceChildren(...(text ? [element("span", { class: "grow" }, text)] : []), ...more);
}

function grow() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("npqwen.theme", theme);
  } catch {
    // the theme lasts until the page is closed
  }
}

// The user's actions

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", newChat);
$("open-settings").addEventListener("click", () => settings.open(current.settings, key));
$("export").addEventListener("click", () => download([...all.values()]));
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async ({ target }) => {
  for (const file of target.files) await importFile(file);
  target.value = "";
});
$("theme").value = document.documentElement.dataset.theme ?? "auto";
$("theme").addEventListener("change", ({ target }) => setTheme(target.value));
$("model").addEventListener("change", ({ target }) => {
  current.settings.model = target.value;
  if (all.has(current.id)) save(current);
  drawModels();
});
$("down").addEventListener("click", () => {
  atEnd = true;
  transcript.scrollTop = transcript.scrollHeight;
});
transcript.addEventListener("scroll", () => {
  atEnd = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < NEAR_END;
  $("down").hidden = atEnd;
});
new ResizeObserver(() => {
  if (atEnd) transcript.scrollTop = transcript.scrollHeight;
}).observe(transcript);
input.addEventListener("input", grow);
input.addEventListener("keydown", (event) => {
  if (isComposing(event)) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !input.value && !answers.has(current.id)) {
    const last = views.findLast((view) => view.message.role === "user");
    if (!last) return;
    event.preventDefault();
    last.edit();
  }
});
document.addEventListener("keydown", (event) => {
  if (isComposing(event)) return;
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    newChat();
  } else if (event.key === "Escape" && !$("settings").open) {
    if (menu.covers) menu.close();
    else stop();
  }
});
addEventListener("hashchange", () => {
  const wanted = all.get(location.hash.slice(1));
  if (wanted && wanted !== current) open(wanted);
});
addEventListener("beforeunload", () => {
  for (const answer of answers.values()) {
    answer.expectLeaving();
    rememberLast(answer.conversation, answer.message);
  }
});
addEventListener("pagehide", () => {
  for (const answer of answers.values()) {
    rememberLast(answer.conversation, answer.message); // Safari on iOS has no "beforeunload"
    answer.leave();
  }
  answers.clear(); // the browser may keep the page for its "back" button
});
addEventListener("pageshow", async ({ persisted }) => {
  if (!persisted) return;
  const saved = await storage.all().catch(() => []);
  for (const id of new Set([...all.keys(), ...saved.map((conversation) => conversation.id)])) otherTab(id);
});

async function start() {
  const place = location.hash.slice(1);
  draw();
  const loading = loadModels();
  try {
    for (const conversation of await storage.all())
      if (!all.has(conversation.id)) all.set(conversation.id, conversation);
    for (const { conversation: id, message } of takeLast()) {
      const conversation = all.get(id);
      if (conversation && conversations.restore(conversation, message)) save(conversation);
    }
  } catch {
    notice("This browser does not let the page save conversations: they last until it is closed.");
  }
  // Reopens this tab's conversation, unless a new one has begun meanwhile.
  const last = all.get(place);
  if (last && !current.messages.length) open(last);
  draw();
  await loading;
  for (const conversation of all.values()) takeUp(conversation);
}

start();
