// Markdown on the screen, also while it streams: only changed blocks are rendered again.

import { copy, element, icon } from "./dom.js";
import { tokens } from "./highlight.js";
import { parse } from "./markdown.js";

export class MarkdownView {
  constructor() {
    this.element = element("div", { class: "markdown" });
    this.blocks = []; // {from, key, block, node} of each block on the screen
  }

  // Shows text, of which the text shown so far is a prefix. open: more text will follow.
  update(text, open) {
    // All but the last two blocks are final: text that follows cannot change them.
    const kept = Math.max(0, this.blocks.length - 2);
    const from = kept ? this.blocks[kept].from : 0;
    const rest = text.slice(from);
    const found = parse(rest, open);
    found.forEach((block, i) => {
      const raw = rest.slice(block.from, block.to);
      const key = open && i === found.length - 1 ? `${raw}\0` : raw;
      const old = this.blocks[kept + i];
      const entry = { from: from + block.from, key, block, node: old?.node };
      if (old?.key !== key && !(old && this.extend(old, block))) {
        entry.node = render(block);
        entry.node.dir ||= "auto"; // of the language that the block begins with
        if (old) old.node.replaceWith(entry.node);
        else this.element.append(entry.node);
      }
      this.blocks[kept + i] = entry;
    });
    for (const { node } of this.blocks.splice(kept + found.length)) node.remove();
  }

  // Code grows in place, so that its selection and scroll position are kept.
  extend({ block, node }, next) {
    if (block.type !== "code" || next.type !== "code" || block.language !== next.language) return false;
    if (!next.text.startsWith(block.text)) return false;
    const code = node.querySelector("code");
    const last = code.lastChild;
    last?.remove(); // A token that may have become longer.
    fillCode(code, next, block.text.length - (last?.textContent.length ?? 0));
    return true;
  }
}

// Appends code starting at index `from`.
function fillCode(code, { text, language }, from = 0) {
  for (const token of tokens(text, language, from))
    code.append(token.kind ? element("span", { class: `code-${token.kind}` }, token.text) : token.text);
}

export function render(block) {
  switch (block.type) {
    case "heading":
      return filled(element(`h${Math.min(block.level + 1, 6)}`), block.inline);
    case "code":
      return codeBlock(block);
    case "math":
      return element("div", { class: "math", dir: "ltr" }, block.text);
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.children.map(render));
    case "list":
      return list(block);
    case "table":
      return table(block);
    default:
      return filled(element("p"), block.inline);
  }
}

function codeBlock(block) {
  const button = element("button", { type: "button", class: "quiet", "aria-label": "Copy code", title: "Copy" },
    icon("copy"));
  const code = element("code");
  fillCode(code, block);
  button.addEventListener("click", () => copy(code.textContent, button));
  const head = element("figcaption", {}, element("span", {}, block.language || "text"), button);
  return element("figure", { class: "code", dir: "ltr" }, head, element("pre", { tabindex: "0" }, code));
}

function list({ ordered, start, loose, items }) {
  const made = element(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? start : null });
  for (const { checked, children } of items) {
    const item = element("li", { class: checked === null ? null : "task" });
    if (checked !== null)
      item.append(element("input", { type: "checkbox", disabled: true, checked, "aria-label": "Task" }));
    for (const child of children) {
      if (child.type === "paragraph" && !loose) filled(item, child.inline);
      else item.append(render(child));
    }
    made.append(item);
  }
  return made;
}

function table({ alignments, header, rows }) {
  const row = (name, cells) =>
    element("tr", {}, ...cells.map((cell, i) => filled(element(name, { class: alignments[i] }), cell)));
  const head = element("thead", {}, row("th", header));
  const body = element("tbody", {}, ...rows.map((cells) => row("td", cells)));
  return element("div", { class: "table", tabindex: "0" }, element("table", {}, head, body));
}

function filled(parent, nodes) {
  for (const node of nodes) parent.append(inline(node));
  return parent;
}

function inline(node) {
  if (typeof node === "string") return node;
  switch (node.type) {
    case "break":
      return element("br");
    case "code":
      return element("code", { dir: "ltr" }, node.text);
    case "math":
      return element("span", { class: "math", dir: "ltr" }, node.text);
    case "link":
      if (!node.href) return filled(element("span", { class: "no-link" }), node.children);
      return filled(
        element("a", { href: node.href, title: node.href, target: "_blank", rel: "noopener noreferrer nofollow" }),
        node.children,
      );
    default:
      return filled(element(node.type), node.children);
  }
}
