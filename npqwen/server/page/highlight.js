// Approximate syntax highlighting: comments, strings, numbers, keywords, tags; in unknown languages only strings and
// numbers. A token is {kind, text}; the concatenated texts of all tokens are the code.

const C = "as async await auto bool boolean break byte case catch char class const continue default def defer delete do " +
  "double dyn else enum export extends extern final finally float fn for foreach from func function go goto if impl " +
  "implements import in instanceof int interface let long loop match mod move mut namespace new null nil of operator " +
  "override package private protected public pub range readonly ref return self short signed sizeof static string " +
  "struct super switch template this throw throws trait true false try type typedef typeof undefined union unsafe " +
  "unsigned use using val var virtual void volatile when where while with yield";
const SCRIPT = "and as assert async await begin break case class continue declare def del do done echo elif else elsif end " +
  "esac except exit export False false fi finally for from function global if import in is lambda let local match nil " +
  "None nonlocal not null or pass raise repeat require return self set source switch then True true try unless until " +
  "using when while with yield";
const SQL = "add all alter and any as asc begin between by case cascade check column commit constraint create cross default " +
  "delete desc distinct drop else end exists foreign from full group having if in index inner insert into is join key " +
  "left like limit not null offset on or order outer over partition primary references returning right rollback select " +
  "set table then union unique update using values view when where with";

// An unterminated string ends with its line or the text.
const STRINGS = String.raw`"(?:[^"\\\n]|\\.|\\(?![^]))*"?|'(?:[^'\\\n]|\\.|\\(?![^]))*'?`;
const TRIPLE = String.raw`"""[^]*?(?:"""|(?![^]))|'''[^]*?(?:'''|(?![^]))`;
const NUMBER = String.raw`\b\d[\w.]*`;
const WORD = String.raw`[\p{L}_$@][\p{L}\p{N}_$]*`;

const LANGUAGES = [
  {
    names: "c cc cpp c++ h hpp cs csharp css d dart go golang groovy java javascript js jsx json jsonc json5 kotlin kt " +
      "less mjs objc php rs rust scala scss swift ts tsx typescript zig proto glsl wgsl",
    comment: String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|(?![^]))`,
    string: `\`(?:[^\`\\\\]|\\\\[^]|\\\\(?![^]))*\`?|${STRINGS}`,
    keywords: C,
  },
  {
    names: "python py python3 pyi ruby rb sh bash zsh fish shell console yaml yml toml ini conf perl pl r julia jl make " +
      "makefile dockerfile docker cmake nix elixir ex nim powershell ps1 tcl",
    comment: String.raw`(?<![\w$&{(\[])#[^\n]*`,
    string: `${TRIPLE}|${STRINGS}`,
    keywords: SCRIPT,
  },
  { names: "sql mysql postgresql sqlite plsql", comment: String.raw`--[^\n]*|\/\*[^]*?(?:\*\/|(?![^]))`, string: STRINGS,
    keywords: `${SQL} ${SQL.toUpperCase()}` },
  { names: "lua haskell hs ada elm vhdl", comment: String.raw`--[^\n]*`, string: STRINGS, keywords: `${C} ${SCRIPT}` },
  { names: "lisp clojure clj scheme asm nasm", comment: ";[^\\n]*", string: '"(?:[^"\\\\]|\\\\[^]|\\\\(?![^]))*"?',
    keywords: "" },
  { names: "html xml svg vue xhtml", comment: "<!--[^]*?(?:-->|(?![^]))", string: String.raw`(?<==)(?:"[^"]*"?|'[^']*'?)`,
    keywords: "", tag: String.raw`<[\/!?]?[\w:-]+|[\/?]?>` },
  { names: "diff patch", comment: String.raw`^(?:@@|diff |index |---|\+\+\+)[^\n]*`, string: String.raw`^\+[^\n]*`,
    tag: String.raw`^-[^\n]*`, keywords: "" },
  { names: "text txt plaintext plain output log md markdown csv", none: true },
].map(prepared);
const OTHER = prepared({ names: "", comment: "(?!)", string: STRINGS, keywords: "" });

function prepared({ names, comment, string, tag = "(?!)", keywords = "", none = false }) {
  const source = `(?<comment>${comment})|(?<string>${string})|(?<tag>${tag})|(?<number>${NUMBER})|(?<word>${WORD})`;
  return {
    names: names.split(" "),
    keywords: new Set(keywords.split(" ")),
    pattern: none ? null : new RegExp(source, "gmu"),
  };
}

function kindOf({ comment, string, tag, number, word }, keywords) {
  if (word !== undefined) return keywords.has(word) ? "keyword" : null;
  if (comment !== undefined) return "comment";
  if (string !== undefined) return "string";
  return tag !== undefined ? "tag" : number !== undefined ? "number" : null;
}

// The tokens of code starting at index `from`, where a token begins. Text appended later can only change the last one.
export function tokens(text, language, from = 0) {
  const { keywords, pattern } = LANGUAGES.find(({ names }) => names.includes(language.toLowerCase())) ?? OTHER;
  if (!pattern) return text.length > from ? [{ kind: null, text: text.slice(from) }] : [];
  const found = [];
  const add = (kind, piece) => {
    if (kind === null && found.length && found.at(-1).kind === null) found.at(-1).text += piece;
    else if (piece) found.push({ kind, text: piece });
  };
  let at = from;
  pattern.lastIndex = from;
  for (let match; (match = pattern.exec(text)); ) {
    add(null, text.slice(at, match.index));
    add(kindOf(match.groups, keywords), match[0]);
    at = match.index + match[0].length;
  }
  add(null, text.slice(at));
  return found;
}
