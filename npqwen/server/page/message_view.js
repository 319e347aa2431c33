// One message on the screen.

import { speed } from "./answer.js";
import { copy, element, icon, iconButton, isComposing, number, seconds } from "./dom.js";
import { MarkdownView } from "./markdown_view.js";
import { HAS_LOCKS } from "./storage.js";

export const WRONG_KEY = "The server does not accept this API key.";
const ENDINGS = {
  length: "Stopped at the token limit.",
  loop: "Stopped, because the text kept repeating itself.",
  stopped: "Stopped.",
};

// actions, for all views: edit(message, text), retry(message), proceed(message), wait(message) to cancel an automatic
// retry, select(message, label) by the button with that label, results(message, texts) of its calls, useKey(key,
// message); and versions(message), needsKey(message).
export function messageView(message, actions) {
  const Kind = { user: UserView, tool: ResultView, assistant: AnswerView }[message.role];
  return new Kind(message, actions);
}

class MessageView {
  constructor(message, actions, label) {
    this.message = message;
    this.actions = actions;
    this.element = element("article", { class: `message ${message.role}`, "aria-label": label });
    this.shown = null; // the state that was last rendered
  }

  // Whether the state differs from the one that was last rendered. Views are updated for every piece of an answer:
  // what has not changed must keep its elements, and with them focus, selection and open details.
  changed(...state) {
    const now = JSON.stringify(state);
    const differs = now !== this.shown;
    this.shown = now;
    return differs;
  }

  versionIds() {
    return this.actions.versions(this.message).map(({ id }) => id);
  }

  // "‹ 2/3 ›"
  versions() {
    const all = this.actions.versions(this.message);
    if (all.length < 2) return null;
    const at = all.indexOf(this.message);
    const step = (to, name, label) =>
      iconButton(name, label, () => this.actions.select(all[to], label), { disabled: !all[to] });
    return element("span", { class: "versions" },
      step(at - 1, "left", "Previous version"), `${at + 1}/${all.length}`, step(at + 1, "right", "Next version"));
  }

  copyButton(text) {
    const button = iconButton("copy", "Copy", () => copy(text(), button));
    return button;
  }
}

class UserView extends MessageView {
  constructor(message, actions) {
    super(message, actions, "You");
    this.editing = false;
  }

  update() {
    if (this.editing || !this.changed(this.versionIds())) return;
    const edit = iconButton("edit", "Edit", () => this.edit());
    const footer = element("footer", {}, this.versions(), this.copyButton(() => this.message.content), edit);
    this.element.replaceChildren(element("div", { class: "bubble", dir: "auto" }, this.message.content), footer);
  }

  edit() {
    const area = element("textarea", { "aria-label": "Edit the message", rows: "3", dir: "auto" });
    area.value = this.message.content;
    const end = () => {
      this.editing = false;
      this.shown = null;
      this.update();
      document.getElementById("input").focus();
    };
    const send = () => {
      if (!area.value.trim()) return;
      end();
      this.actions.edit(this.message, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        end();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    this.editing = true;
    this.element.replaceChildren(
      element("form", { class: "edit", onsubmit: (event) => (event.preventDefault(), send()) }, area,
        element("div", { class: "row" },
          element("button", { type: "button", onclick: end }, "Cancel"),
          element("button", { class: "primary" }, "Send"))));
    area.focus();
  }
}

class ResultView extends MessageView {
  constructor(message, actions) {
    super(message, actions, "Result of a tool");
    this.element.append(
      element("details", { class: "fold" }, element("summary", {}, icon("right"), "Result"),
        element("pre", { tabindex: "0", dir: "auto" }, message.content)));
  }

  update() {}
}

class AnswerView extends MessageView {
  constructor(message, actions) {
    super(message, actions, "Answer");
    this.thought = new MarkdownView();
    this.text = new MarkdownView();
    this.label = element("span", { class: "label" });
    this.preview = element("span", { class: "preview", dir: "auto" });
    const summary = element("summary", { onclick: () => (this.toggled = true) }, icon("right"), this.label, this.preview);
    this.thinking = element("details", { class: "fold thinking", hidden: true }, summary, this.thought.element);
    this.toggled = false; // the user has opened or closed the reasoning
    this.calls = element("div", { class: "calls" });
    this.status = element("div", { class: "status" });
    this.bar = element("progress", { "aria-label": "Prompt read" });
    this.statusText = element("span");
    this.status.append(this.statusText, this.bar);
    this.error = element("div", { class: "error", role: "alert", hidden: true });
    this.footer = element("footer");
    this.countdown = element("span", { class: "hint", "aria-live": "off" });
    this.element.append(this.thinking, this.text.element, this.calls, this.status, this.error, this.footer);
  }

  // answer: the running Answer, or null. elsewhere: another tab receives it. waiting: seconds until it is retried, or null. showThinking: show reasoning
  // while it streams. last: it is the last message.
  update({ answer = null, elsewhere = false, waiting = null, showThinking = false, last = true } = {}) {
    const { message } = this;
    const running = answer !== null;
    this.element.setAttribute("aria-busy", running);
    this.text.update(message.content, running);
    this.updateThought(running, showThinking);
    this.updateStatus(answer);
    this.updateCalls(running, last);
    const waits = waiting !== null;
    const arrives = elsewhere && message.finish === null;
    const state = [running, arrives, message.finish, message.error, waits, last, this.versionIds(), message.usage];
    if (this.changed(...state)) {
      this.updateError(running, arrives, waits, last);
      this.updateFooter(running || arrives, last);
    }
    if (waits) this.countdown.textContent = `Trying again in ${waiting} s`;
    if (running) this.updateSpeed(answer);
  }

  updateThought(running, showThinking) {
    const { reasoning, content, calls, times, usage } = this.message;
    this.thinking.hidden = !reasoning;
    if (!reasoning) return;
    const thinking = running && !content && !calls.length;
    if (!this.toggled) this.thinking.open = thinking && showThinking;
    this.thought.update(reasoning, thinking);
    const end = times.thought ?? times.last;
    const parts = [thinking ? "Thinking" : end > times.first ? `Thought for ${seconds(end - times.first)}` : "Thought"];
    if (usage?.reasoning) parts.push(`${number(usage.reasoning)} tokens`);
    else if (thinking) parts.push(seconds(end - times.first));
    this.label.textContent = parts.join(" · ");
    this.thinking.classList.toggle("live", thinking);
    this.preview.textContent = thinking ? reasoning.trimEnd().split("\n").at(-1).slice(-300) : "";
  }

  updateStatus(answer) {
    const { content, reasoning, calls } = this.message;
    this.status.hidden = !answer || Boolean(content || reasoning || calls.length);
    if (this.status.hidden) return;
    const { progress } = answer;
    this.bar.hidden = !progress?.total;
    if (progress?.total) {
      this.bar.max = progress.total;
      this.bar.value = progress.done;
      const cached = progress.cached ? `, ${number(progress.cached)} cached` : "";
      this.statusText.textContent =
        `Reading the prompt: ${number(progress.done)} of ${number(progress.total)} tokens${cached}`;
    } else this.statusText.textContent = "Waiting for the first word";
  }

  updateCalls(running, last) {
    const { calls, finish } = this.message;
    const state = JSON.stringify([calls, running, last, finish]);
    if (this.calls.dataset.state === state || (!calls.length && !this.calls.firstChild)) return;
    this.calls.dataset.state = state;
    const asking = last && !running && calls.length > 0 && finish === "tool_calls";
    this.calls.replaceChildren(...calls.filter(Boolean).map((call) =>
      element("div", { class: "call" },
        element("div", { class: "name" }, icon("tool"), call.name),
        element("pre", { tabindex: "0" }, pretty(call.arguments)))));
    if (asking) this.calls.append(this.resultForm());
  }

  // Here, the user runs the tools.
  resultForm() {
    const { calls } = this.message;
    const areas = calls.map((call) =>
      element("label", {}, `Result of ${call.name}`, element("textarea", { rows: "2", required: true, dir: "auto" })));
    const send = (event) => {
      event.preventDefault();
      this.actions.results(this.message, areas.map((label) => label.querySelector("textarea").value));
    };
    return element("form", { class: "results", onsubmit: send }, ...areas,
      element("div", { class: "row" }, element("button", { class: "primary" }, "Send results")));
  }

  updateError(running, arrives, waits, last) {
    const { message } = this;
    const { finish, error, stream } = message;
    const wantsKey = this.actions.needsKey(message);
    const unfinished = arrives ? "This answer is arriving in another tab."
      : stream && !HAS_LOCKS ? "This answer was interrupted, or is arriving in another tab."
      : "This answer was interrupted.";
    const text = wantsKey ? WRONG_KEY : error ?? (finish === null ? unfinished : ENDINGS[finish]);
    this.error.hidden = running || !text;
    if (this.error.hidden) return;
    this.error.classList.toggle("mild", !error);
    const retry = element("button", { type: "button", onclick: () => this.actions.retry(message) },
      waits ? "Retry now" : "Retry");
    const row = element("div", { class: "row" }, retry);
    if (message.content && !message.calls.length)
      row.append(element("button", { type: "button", onclick: () => this.actions.proceed(message) }, "Continue"));
    if (waits)
      row.append(
        this.countdown,
        element("button", { type: "button", onclick: () => this.actions.wait(message) }, "Cancel"));
    const key = wantsKey ? keyForm((value) => this.actions.useKey(value, message)) : null;
    this.error.replaceChildren(element("p", {}, text), ...(last && !arrives ? [key ?? row] : []));
  }

  updateFooter(running, last) {
    const { message } = this;
    this.speed = element("span", { class: "speed" }, running ? "" : this.summary());
    this.speed.title = running ? "" : this.details();
    this.footer.replaceChildren(this.versions() ?? "");
    if (!running) {
      if (message.content) this.footer.append(this.copyButton(() => message.content));
      // An error has its own button to retry.
      if (!message.error || !last)
        this.footer.append(iconButton("retry", "Answer again", () => this.actions.retry(message)));
    } else this.footer.append(element("span", { class: "dot" }));
    this.footer.append(this.speed);
    this.footer.classList.toggle("last", last);
  }

  updateSpeed({ pieces }) {
    const { first, last } = this.message.times;
    // The first chunks say little about the speed.
    this.speed.textContent =
      last - first > 500 ? `about ${speed(pieces, this.message.times).toFixed(1)} tokens/s` : "";
  }

  summary() {
    const { usage, times, speed: measured } = this.message;
    const parts = [];
    const rate = measured || (usage && speed(usage.completion, times));
    if (rate) parts.push(`${rate.toFixed(1)} tokens/s`);
    if (usage) parts.push(`${number(usage.completion)} tokens`);
    if (times.first) parts.push(`first after ${seconds(times.first)}`);
    return parts.join(" · ");
  }

  details() {
    const { usage, model } = this.message;
    if (!usage) return model;
    const cached = usage.cached ? `, ${number(usage.cached)} of them cached` : "";
    return `${model}\nprompt: ${number(usage.prompt)} tokens${cached}`;
  }
}

export function keyForm(onkey) {
  const input = element("input", { type: "password", name: "key", required: true, autocomplete: "current-password",
    "aria-label": "API key", placeholder: "API key" });
  const submit = (event) => {
    event.preventDefault();
    onkey(input.value.trim());
  };
  return element("form", { class: "key row", onsubmit: submit }, input,
    element("button", { class: "primary" }, "Use this key"));
}

// JSON with line breaks and indentation. Incomplete JSON stays as it is, and so do numbers with more digits than
// JavaScript keeps.
function pretty(json) {
  try {
    const value = JSON.parse(json);
    const same = JSON.stringify(value) === json.replace(/("(?:[^"\\]|\\.)*")|\s+/g, "$1");
    return same ? JSON.stringify(value, null, 2) : json;
  } catch {
    return json;
  }
}
