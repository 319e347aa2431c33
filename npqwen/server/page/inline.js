// Markdown inside a paragraph, a heading or a cell: text -> nodes.
//
// A node is a string or {type, children}, with type "em", "strong", "del" or "link" (and href); or {type, text} with
// type "code" or "math"; or {type: "break"}. Everything that is not Markdown stays text, HTML included.

const PUNCTUATION = /[\p{P}\p{S}]/u;
const URL_START = /https?:\/\/[^\s<>"`|]+/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const DESTINATION =
  /\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*))(?:\s+(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'))?\s*\)/y;
const DOLLARS = /\$\$[^$]+\$\$|\$(?![\s$])(?:[^$\\\n]|\\.)*(?<!\s)\$(?!\d)/y;
const ENTITY = /&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|([a-zA-Z]{2,8}));/y;
const ENTITIES = {
  amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", trade: "™", deg: "°",
  ndash: "–", mdash: "—", hellip: "…", bull: "•", middot: "·", times: "×", divide: "÷", plusmn: "±", larr: "←",
  rarr: "→", le: "≤", ge: "≥", ne: "≠", euro: "€", pound: "£", laquo: "«", raquo: "»",
};
const LINK_SCHEMES = ["http:", "https:", "mailto:"];
const MOST_DEEP = 16; // levels of emphasis; deeper ones stay text
const MOST_OPEN = 64; // how many delimiters back the opener of a closing one is searched for

// The URL if a link may lead to it, or null. Relative URLs would lead to this server.
export function safeHref(href) {
  try {
    const url = new URL(href);
    return LINK_SCHEMES.includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

// open: more text will follow; markup that is not closed yet is treated as closed at the end.
export function parseInline(text, open = false) {
  return emphasise(new Scanner(text, open).tokens(), open);
}

class Scanner {
  constructor(text, open) {
    this.text = text;
    this.open = open;
    this.at = 0;
    this.out = [];
    this.brackets = []; // indices in out of "[" that may begin a link
    this.missing = new Set(); // closing delimiters that do not occur in the rest
  }

  tokens() {
    const special = /[\\`*_~[\]<&$\n!]|https?:\/\//g;
    while (this.at < this.text.length) {
      special.lastIndex = this.at;
      const found = special.exec(this.text);
      const end = found ? found.index : this.text.length;
      if (end > this.at) this.push(this.text.slice(this.at, end));
      this.at = end;
      if (found && !this.special(found[0])) {
        this.push(found[0]);
        this.at += found[0].length;
      }
    }
    return this.out;
  }

  push(node) {
    const last = this.out.length - 1;
    if (typeof node === "string" && typeof this.out[last] === "string" && this.brackets.at(-1) !== last)
      this.out[last] += node;
    else this.out.push(node);
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    return pattern.exec(this.text);
  }

  // Parses the construct that begins here; false if it is only text.
  special(mark) {
    switch (mark[0]) {
      case "\\": return this.backslash();
      case "`": return this.code();
      case "*": case "_": case "~": return this.delimiters(mark);
      case "[": return this.bracket(1);
      case "!": return this.text[this.at + 1] === "[" && this.bracket(2);
      case "]": return this.closing();
      case "<": return this.autolink();
      case "h": return this.address();
      case "&": return this.entity();
      case "$": return this.take(this.match(DOLLARS), (found) => ({ type: "math", text: found[0] }));
      default: return this.line();
    }
  }

  take(found, node) {
    if (!found) return false;
    this.push(node(found));
    this.at += found[0].length;
    return true;
  }

  backslash() {
    const next = this.text[this.at + 1];
    if (next === "(" || next === "[") {
      const close = next === "(" ? "\\)" : "\\]";
      const end = this.missing.has(close) ? -1 : this.text.indexOf(close, this.at + 2);
      if (end >= 0) {
        this.push({ type: "math", text: this.text.slice(this.at, end + 2) });
        this.at = end + 2;
        return true;
      }
      this.missing.add(close);
      if (this.open && next === "(") {
        this.push({ type: "math", text: this.text.slice(this.at) });
        this.at = this.text.length;
        return true;
      }
    }
    if (next === "\n") {
      this.push({ type: "break" });
      this.at += 2;
      return true;
    }
    if (next === undefined || !/[!-/:-@[-`{-~]/.test(next)) return false;
    this.push(next);
    this.at += 2;
    return true;
  }

  code() {
    const run = /`+/y;
    const ticks = this.match(run)[0];
    const start = this.at + ticks.length;
    let end = -1;
    if (!this.missing.has(ticks)) {
      const close = new RegExp(`(?<!\`)${ticks}(?!\`)`, "g");
      close.lastIndex = start;
      end = close.exec(this.text)?.index ?? -1;
      if (end < 0) this.missing.add(ticks);
    }
    if (end < 0 && this.open && start < this.text.length) end = this.text.length;
    if (end < 0) {
      this.push(ticks);
      this.at = start;
      return true;
    }
    let text = this.text.slice(start, end).replaceAll("\n", " ");
    if (/^ .* $/.test(text) && text.trim()) text = text.slice(1, -1);
    this.push({ type: "code", text });
    this.at = Math.min(end + ticks.length, this.text.length);
    return true;
  }

  // A run of * or _ or ~; whether it may open or close follows CommonMark's flanking rules.
  delimiters(mark) {
    let end = this.at;
    while (this.text[end] === mark) end++;
    const count = end - this.at;
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[end] ?? " ";
    const left = !/\s/.test(after) && (!PUNCTUATION.test(after) || /\s/.test(before) || PUNCTUATION.test(before));
    const right = !/\s/.test(before) && (!PUNCTUATION.test(before) || /\s/.test(after) || PUNCTUATION.test(after));
    const whole = /\s/.test(before) || PUNCTUATION.test(before);
    let opens = left;
    let closes = right;
    if (mark === "_") {
      opens = left && (!right || PUNCTUATION.test(before));
      closes = right && (!left || PUNCTUATION.test(after));
    }
    if (mark === "~" && count !== 2) opens = closes = false;
    this.out.push({ type: "delimiter", mark, count, opens, closes, both: opens && closes, whole });
    this.at = end;
    return true;
  }

  // "[" of a link or "![" of an image. Images are never loaded: they become links.
  bracket(length) {
    this.brackets.push(this.out.length);
    this.out.push(this.text.slice(this.at, this.at + length));
    this.at += length;
    return true;
  }

  closing() {
    const start = this.brackets.pop();
    if (start === undefined) return false;
    this.at++;
    const found = this.match(DESTINATION);
    const unfinished = !found && this.open && this.text[this.at] === "(" && !/[)\n]/.test(this.text.slice(this.at));
    if (!found && !unfinished) {
      this.at--;
      return false;
    }
    const tokens = this.out.splice(start);
    const image = tokens.shift() === "![";
    const children = emphasise(tokens, false);
    const target = found ? (found[1] ?? found[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1") : "";
    if (!children.length) children.push(target);
    this.push({ type: "link", href: safeHref(target), children });
    if (!image) this.brackets = []; // no links in links
    this.at = found ? this.at + found[0].length : this.text.length;
    return true;
  }

  autolink() {
    const line = this.match(/<br\s*\/?>/iy);
    if (line) return this.take(line, () => ({ type: "break" }));
    return this.take(this.match(AUTOLINK), (found) =>
      ({ type: "link", href: safeHref(found[1]), children: [found[1].replace(/^mailto:/, "")] }));
  }

  address() {
    if (/\w/.test(this.text[this.at - 1] ?? "")) return false;
    let url = this.match(URL_START)?.[0];
    if (!url) return false;
    for (;;) {
      const shorter = url.replace(/[.,;:!?'"*_~\]]+$/, "");
      const unbalanced = shorter.endsWith(")") && shorter.split("(").length < shorter.split(")").length;
      const next = unbalanced ? shorter.slice(0, -1) : shorter;
      if (next === url) break;
      url = next;
    }
    const href = safeHref(url);
    if (!href) return false;
    this.push({ type: "link", href, children: [url] });
    this.at += url.length;
    return true;
  }

  entity() {
    return this.take(this.match(ENTITY), ([all, decimal, hexadecimal, name]) => {
      if (name) return Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : all;
      const code = decimal ? Number.parseInt(decimal, 10) : Number.parseInt(hexadecimal, 16);
      return code > 0 && code < 0x110000 && !(code >= 0xd800 && code < 0xe000) ? String.fromCodePoint(code) : "\ufffd";
    });
  }

  // A model's line breaks are intended.
  line() {
    const last = this.out.length - 1;
    if (typeof this.out[last] === "string") this.out[last] = this.out[last].trimEnd();
    this.push({ type: "break" });
    this.at++;
    while (this.text[this.at] === " ") this.at++;
    return true;
  }
}

// Pairs delimiters as CommonMark does.
function emphasise(tokens, open) {
  const out = [];
  const openers = []; // indices in out
  const wrap = (at, use) => {
    const opener = out[at];
    const children = plain(out.splice(at + 1));
    opener.count -= use;
    if (!opener.count) out.pop();
    if (!children.length) return;
    const depth = children.reduce((most, child) => Math.max(most, (child.depth ?? 0) + 1), 1);
    const type = opener.mark === "~" ? "del" : use === 2 ? "strong" : "em";
    if (depth <= MOST_DEEP) out.push({ type, children, depth });
    else for (const child of [opener.mark.repeat(use), ...children, opener.mark.repeat(use)]) out.push(child);
  };
  for (const token of tokens) {
    if (token.type !== "delimiter") {
      out.push(token);
      continue;
    }
    let left = token.count;
    while (left && token.closes) {
      const found = partner(out, openers, token, left);
      if (found < 0) break;
      openers.length = found + 1;
      const at = openers[found];
      const use = Math.min(2, left, out[at].count);
      if (out[at].count === use) openers.pop();
      wrap(at, use);
      left -= use;
    }
    if (left) {
      if (token.opens) openers.push(out.length);
      out.push({ ...token, count: left });
    }
  }
  while (open && openers.length) {
    const at = openers.pop();
    const opener = out[at];
    if (opener.whole && opener.count <= 2) wrap(at, opener.count);
  }
  return plain(out);
}

function partner(out, openers, token, left) {
  for (let i = openers.length - 1; i >= Math.max(0, openers.length - MOST_OPEN); i--) {
    const opener = out[openers[i]];
    if (opener.mark !== token.mark) continue;
    const odd = (opener.both || token.both) && (opener.count + left) % 3 === 0 && (opener.count % 3 || left % 3);
    if (!odd) return i;
  }
  return -1;
}

// Unpaired delimiters become text; adjacent texts are merged.
function plain(nodes) {
  const out = [];
  for (const node of nodes) {
    const one = node.type === "delimiter" ? node.mark.repeat(node.count) : node;
    if (typeof one === "string" && typeof out.at(-1) === "string") out[out.length - 1] += one;
    else out.push(one);
  }
  return out;
}
