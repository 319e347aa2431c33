// Markdown blocks: text -> tree. HTML is not supported: it stays text.
//
// A block is {type, ...} with
//   paragraph, heading (level): inline, a list of nodes as in inline.js
//   code: language, text          math: text          rule
//   quote: children               list: ordered, start, loose, items: [{checked (true, false, null), children}]
//   table: alignments ("left", "center", "right", null), header and rows: lists of cells, a cell is inline nodes
// Top-level blocks also have from and to, the range of their characters in the text.

import { parseInline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})[ \t]*(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|)$/;
const UNDERLINE = /^ {0,3}(=+|-{2,})[ \t]*$/;
// The second line of a table, trimmed.
const DELIMITER_ROW = /^(?:\|\s*)?:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/;
// A last line, trimmed, whose type of block cannot be determined yet.
const UNDECIDED = /^(?:[-*+]|\d{1,3}[.)]|#{1,6}|>|`{1,2}|~{1,2}|[-=*_]{2,}|\|[\s:|-]*|\\|\$)?$/;
const MOST_DEEP = 24; // levels of nested quotes and lists; deeper ones stay text
const LONGEST_FORMULA = 100; // lines

// open: more text will follow; unfinished markup at the end is parsed as what it probably becomes.
export function parse(text, open = false) {
  const lines = text.split("\n");
  const starts = [];
  let at = 0;
  for (const line of lines) {
    starts.push(at);
    at += line.length + 1;
  }
  if (open && UNDECIDED.test(lines.at(-1).trim())) lines.pop();
  const found = new Blocks(lines.map(withoutReturn), open, 0).all();
  for (const block of found) {
    block.from = starts[block.from];
    block.to = block.to < starts.length ? starts[block.to] : text.length;
  }
  return found;
}

function withoutReturn(line) {
  return line.endsWith("\r") ? line.slice(0, -1) : line;
}

// The line with its indentation as spaces, four for a tab: how blocks are recognized. Code keeps its tabs.
function expanded(line) {
  return line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));
}

// The line without its first `columns` columns, as far as they are indentation.
function dedented(line, columns) {
  let at = 0;
  let left = columns;
  for (; left > 0 && (line[at] === " " || line[at] === "\t"); at++) left -= line[at] === "\t" ? 4 : 1;
  return " ".repeat(Math.max(0, -left)) + line.slice(at);
}

function indentation(line) {
  return line.length - line.trimStart().length;
}

function isBlank(line) {
  return line.trim() === "";
}

class Blocks {
  constructor(lines, open, depth) {
    this.written = lines;
    this.lines = lines.map(expanded);
    this.open = open;
    this.depth = depth;
    this.at = 0;
  }

  all() {
    const blocks = [];
    while (this.at < this.lines.length) {
      if (isBlank(this.lines[this.at])) {
        this.at++;
        continue;
      }
      const from = this.at;
      const block = this.next();
      blocks.push({ ...block, from, to: this.at });
    }
    return blocks;
  }

  next() {
    const line = this.lines[this.at];
    let found;
    if ((found = FENCE.exec(line))) return this.fence(line, found[1], found[2]);
    const formula = this.formula(line);
    if (formula) return formula;
    if ((found = HEADING.exec(line))) {
      this.at++;
      const text = (found[2] ?? "").replace(/(?:^|[ \t])#+[ \t]*$/, "").trim();
      return { type: "heading", level: found[1].length, inline: this.inline(text) };
    }
    if (RULE.test(line)) {
      this.at++;
      return { type: "rule" };
    }
    if (this.depth < MOST_DEEP) {
      if (QUOTE.test(line)) return this.quote();
      if ((found = ITEM.exec(line)) && found[1].length < 4) return this.list();
    }
    if (indentation(line) >= 4) return this.indented();
    return this.table() ?? this.paragraph();
  }

  // Nodes of a text that ends at the current line.
  inline(text) {
    return parseInline(text, this.open && this.at >= this.lines.length);
  }

  inner(lines) {
    return new Blocks(lines, this.open && this.at >= this.lines.length, this.depth + 1).all();
  }

  fence(line, mark, info) {
    const indent = indentation(line);
    const close = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`);
    const body = [];
    this.at++;
    while (this.at < this.lines.length && !close.test(this.lines[this.at]))
      body.push(dedented(this.written[this.at++], indent));
    this.at++; // The closing line; without one, the code ends with the text.
    return { type: "code", language: /^[^\s{]*/.exec(info)[0], text: body.join("\n") };
  }

  // $$...$$ or \[...\] on lines of its own.
  formula(line) {
    const start = line.trim();
    const close = start.startsWith("$$") ? "$$" : start.startsWith("\\[") ? "\\]" : null;
    if (!close) return null;
    const first = start.slice(2);
    if (first.includes(close) && first.indexOf(close) + 2 < first.length) return null;
    const most = Math.min(this.lines.length, this.at + LONGEST_FORMULA);
    let end = this.at;
    for (; end < most && !(end > this.at && isBlank(this.lines[end])); end++) {
      const text = this.lines[end].trim();
      if ((end === this.at ? first : text).endsWith(close)) return this.formulaTo(end + 1);
    }
    return this.open && end === this.lines.length ? this.formulaTo(end) : null;
  }

  formulaTo(end) {
    const text = this.lines.slice(this.at, end).join("\n").trim();
    this.at = end;
    return { type: "math", text };
  }

  quote() {
    const lines = [];
    while (this.at < this.lines.length && QUOTE.test(this.lines[this.at]))
      lines.push(this.written[this.at++].replace(/^ {0,3}>[ \t]?/, ""));
    return { type: "quote", children: this.inner(lines) };
  }

  list() {
    const [, , marker] = ITEM.exec(this.lines[this.at]);
    const ordered = marker.length > 1;
    const kind = marker.at(-1);
    const items = [];
    let loose = false;
    let blank = false;
    while (this.at < this.lines.length) {
      const line = this.lines[this.at];
      const found = ITEM.exec(line);
      if (!found || found[1].length >= 4 || found[2].at(-1) !== kind || RULE.test(line)) break;
      loose ||= blank;
      const { lines, ended } = this.item(found);
      const children = this.inner(lines);
      loose ||= children.slice(1).some((child) => isBlank(lines[child.from - 1] ?? "x") && child.type !== "list");
      const task = /^\[([ xX])\]\s+/.exec(lines[0]);
      if (task && children[0]?.type === "paragraph") {
        lines[0] = lines[0].slice(task[0].length);
        items.push({ checked: task[1] !== " ", children: this.inner(lines) });
      } else items.push({ checked: null, children });
      blank = ended;
    }
    return { type: "list", ordered, start: ordered ? Number.parseInt(marker, 10) : 1, loose, items };
  }

  // The lines of an item without its indentation; ended: a blank line follows.
  item([, space, marker, gap, first]) {
    const content = space.length + marker.length + (gap && gap.length <= 4 ? gap.length : 1);
    // Models often indent less than the marker is wide.
    const least = space.length + 2;
    const lines = [(gap && gap.length > 4 ? gap.slice(1) : "") + (first ?? "")];
    let blanks = 0;
    let fence = closing(lines[0]);
    this.at++;
    for (; this.at < this.lines.length; this.at++) {
      const line = this.lines[this.at];
      if (isBlank(line)) {
        blanks++;
        continue;
      }
      const indent = indentation(line);
      const belongs =
        indent >= content ||
        (indent >= least && (fence || !blanks || ITEM.test(line))) ||
        (!blanks && !fence && !this.begins(line) && !ITEM.test(line));
      if (!belongs) break;
      for (; blanks; blanks--) lines.push("");
      const own = dedented(this.written[this.at], content);
      lines.push(own);
      fence = fence ? (fence.test(own) ? null : fence) : closing(own);
    }
    if (this.open && this.at >= this.lines.length) blanks = 0;
    return { lines, ended: blanks > 0 };
  }

  indented() {
    const lines = [];
    let end = this.at;
    for (; this.at < this.lines.length; this.at++) {
      const line = this.lines[this.at];
      if (!isBlank(line) && indentation(line) < 4) break;
      lines.push(dedented(this.written[this.at], 4));
      if (!isBlank(line)) end = this.at + 1;
    }
    lines.length -= this.at - end;
    this.at = end;
    return { type: "code", language: "", text: lines.join("\n") };
  }

  table() {
    const line = this.lines[this.at];
    const next = this.lines[this.at + 1];
    const coming = this.open && next === undefined && line.trimStart().startsWith("|");
    if (!coming && (next === undefined || !line.includes("|") || !DELIMITER_ROW.test(next.trim()) || !/[|:]/.test(next)))
      return null;
    const header = cells(line);
    const alignments = coming ? header.map(() => null) : cells(next).map(alignment);
    if (alignments.length !== header.length) return null;
    const bodies = [];
    this.at += 2;
    while (this.at < this.lines.length && !isBlank(this.lines[this.at]) && !this.begins(this.lines[this.at]))
      bodies.push(this.lines[this.at++]);
    const row = (texts) => header.map((_, i) => this.inline(texts[i] ?? ""));
    return { type: "table", alignments, header: row(header), rows: bodies.map((body) => row(cells(body))) };
  }

  paragraph() {
    const lines = [this.lines[this.at++].trimStart()];
    while (this.at < this.lines.length) {
      const line = this.lines[this.at];
      const underline = UNDERLINE.exec(line);
      if (underline) {
        this.at++;
        return { type: "heading", level: underline[1][0] === "=" ? 1 : 2, inline: this.inline(lines.join("\n")) };
      }
      if (isBlank(line) || this.begins(line) || this.tableAt(this.at)) break;
      lines.push(line.trimStart());
      this.at++;
    }
    return { type: "paragraph", inline: this.inline(lines.join("\n").trimEnd()) };
  }

  tableAt(at) {
    const next = this.lines[at + 1];
    return this.lines[at].includes("|") && next !== undefined && next.includes("|") && DELIMITER_ROW.test(next.trim());
  }

  // Whether a line in a paragraph begins another block.
  begins(line) {
    if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
    if (/^ {0,3}(?:\$\$|\\\[)/.test(line)) return true;
    if (this.depth >= MOST_DEEP) return false;
    const item = ITEM.exec(line);
    return QUOTE.test(line) || Boolean(item && item[4] && item[1].length < 4 && /^(?:\D|1\D)/.test(item[2]));
  }
}

// The pattern of the line that closes the code fence which this line opens, or null.
function closing(line) {
  const found = FENCE.exec(line);
  return found && new RegExp(`^ {0,3}${found[1][0]}{${found[1].length},}[ \\t]*$`);
}

// The cells of a row: split at "|" that are not escaped and not in code.
function cells(line) {
  const text = line.trim().replace(/^\|/, "");
  const found = [];
  let cell = "";
  let code = false;
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i++;
    } else if (text[i] === "|" && !code) {
      found.push(cell.trim());
      cell = "";
    } else {
      if (text[i] === "`") code = !code && text.includes("`", i + 1);
      cell += text[i];
    }
  }
  if (cell.trim() || !found.length) found.push(cell.trim());
  return found;
}

function alignment(cell) {
  const left = cell.startsWith(":");
  const right = cell.endsWith(":");
  return left && right ? "center" : right ? "right" : left ? "left" : null;
}
