// The list of conversations.

import { element, icon, iconButton, isComposing } from "./dom.js";

export class Sidebar {
  // actions: open(id), rename(id, title), remove(id), save(id)
  constructor(list, search, actions) {
    this.list = list;
    this.search = search;
    this.actions = actions;
    this.renaming = null; // the id whose title is being edited
    search.addEventListener("input", () => this.draw());
    search.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !search.value) return;
      event.stopPropagation();
      search.value = "";
      this.draw();
    });
  }

  // conversations: newest first. running: ids of those with an answer in progress.
  update(conversations, current, running) {
    Object.assign(this, { conversations, current, running });
    if (!this.renaming) this.draw();
  }

  draw() {
    const wanted = this.search.value.trim().toLowerCase();
    const found = this.conversations.filter((conversation) => matches(conversation, wanted));
    const focused = this.list.querySelector("li:focus-within")?.dataset.id;
    this.list.replaceChildren(...found.map((conversation) => this.entry(conversation)));
    // The keyboard goes on where it was.
    if (focused) (this.list.querySelector(`[data-id="${focused}"] .open`) ?? this.list.querySelector(".open"))?.focus();
    if (!found.length && wanted) this.list.append(element("li", { class: "hint" }, "Nothing found"));
  }

  entry({ id, title }) {
    const name = title || "New chat";
    const open = element("button",
      { type: "button", class: "open", title: name, "aria-current": id === this.current ? "page" : null,
        onclick: () => this.actions.open(id) },
      element("span", { dir: "auto" }, name));
    if (this.running.has(id)) open.append(element("span", { class: "dot", title: "Answering" }));
    const item = element("li", { "data-id": id }, open,
      iconButton("edit", `Rename ${name}`, () => this.rename(item, id, title), { title: "Rename" }),
      iconButton("download", `Export ${name}`, () => this.actions.save(id), { title: "Export" }),
      iconButton("trash", `Delete ${name}`, () => this.confirm(item, id, name), { title: "Delete" }));
    return item;
  }

  rename(item, id, title) {
    const input = element("input", { "aria-label": "Title", dir: "auto", value: title, maxlength: "200" });
    const end = (save) => {
      if (this.renaming !== id) return;
      this.renaming = null;
      if (save && input.value.trim()) this.actions.rename(id, input.value.trim());
      this.draw();
    };
    this.renaming = id;
    input.addEventListener("blur", () => end(true));
    input.addEventListener("keydown", (event) => {
      if (isComposing(event) || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
    });
    item.replaceChildren(input);
    input.select();
  }

  confirm(item, id, name) {
    const yes = element("button", { type: "button", class: "danger", onclick: () => this.actions.remove(id) }, "Delete");
    const no = element("button", { type: "button", onclick: () => this.draw() }, "Keep");
    item.classList.add("confirm");
    item.replaceChildren(icon("trash"), element("span", { class: "grow", title: name }, "Delete it?"), yes, no);
    item.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        this.draw();
      }
    });
    yes.focus();
  }
}

function matches({ title, messages }, wanted) {
  if (!wanted || title.toLowerCase().includes(wanted)) return true;
  return messages.some(({ content }) => content.toLowerCase().includes(wanted));
}
