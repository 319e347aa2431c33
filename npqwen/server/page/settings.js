// The settings of a conversation: the form, the stored values, and the request fields that they become.

import { remember, remembered } from "./storage.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

export function defaults() {
  return remembered("defaults", {});
}

// The request fields for these settings. Throws an Error with a message for the user.
export function requestFields(settings) {
  const fields = {};
  for (const name of NUMBERS) if (settings[name] !== undefined) fields[name] = settings[name];
  if (settings.thinking) fields.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  if (settings.thinking_budget !== undefined && settings.thinking !== "off")
    fields.thinking_budget = settings.thinking_budget;
  if (settings.tools?.trim()) fields.tools = tools(settings.tools);
  return fields;
}

function tools(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`Settings: the tools are not valid JSON (${error.message})`);
  }
  // A bare function is accepted instead of {"type": "function", "function": ...}.
  return [found].flat().map((tool) => (tool?.function ? tool : { type: "function", function: tool }));
}

export class SettingsDialog {
  // onchange(settings): the conversation's settings as they are now. onkey(key): another API key.
  constructor(dialog, { onchange, onkey }) {
    this.dialog = dialog;
    this.form = dialog.querySelector("form");
    this.showThinking = remembered("show thinking", false);
    const { elements } = this.form;
    this.form.addEventListener("input", ({ target }) => {
      if (target.name === "show_thinking") {
        this.showThinking = target.checked;
        remember("show thinking", target.checked);
      } else if (target.name !== "key" && target.name) onchange(this.read());
    });
    elements.key.addEventListener("change", () => onkey(elements.key.value.trim()));
    elements.tools.addEventListener("input", () => elements.tools.setCustomValidity(problem(elements.tools.value)));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close();
    });
    dialog.querySelector("#use-as-default").addEventListener("click", ({ target }) => {
      remember("defaults", this.read());
      target.textContent = "Saved for new chats";
      setTimeout(() => (target.textContent = "Use for new chats"), 1500);
    });
    dialog.querySelector("#reset-settings").addEventListener("click", () => {
      this.write({});
      onchange({});
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // outside the form
    });
  }

  open(settings, key) {
    this.write(settings);
    this.form.elements.key.value = key;
    this.form.elements.show_thinking.checked = this.showThinking;
    this.dialog.showModal();
  }

  fields() {
    return [...this.form.elements].filter(({ name }) => name && name !== "key" && name !== "show_thinking");
  }

  write(settings) {
    for (const field of this.fields()) field.value = settings[field.name] ?? "";
  }

  // The values of valid fields, and tools as they are written; an empty field means the model's default.
  read() {
    const settings = {};
    for (const field of this.fields()) {
      if (field.value === "" || (field.name !== "tools" && !field.checkValidity())) continue;
      settings[field.name] = field.type === "number" ? field.valueAsNumber : field.value;
    }
    return settings;
  }
}

function problem(text) {
  try {
    requestFields({ tools: text });
    return "";
  } catch (error) {
    return error.message;
  }
}
