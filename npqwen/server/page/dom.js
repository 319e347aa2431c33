// Elements are built from names, properties and text; no string is ever parsed as HTML.

// element("p", {class: "note", onclick: f}, "text", child): properties that start with "on" are listeners, true is an
// empty attribute, and null, undefined or false leave an attribute out.
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

// One of the symbols of index.html.
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

// A button that is only an icon; the label is its tooltip and its name for screen readers.
export function iconButton(name, label, onclick, properties = {}) {
  return element("button", { type: "button", class: "quiet", title: label, "aria-label": label, onclick, ...properties },
    icon(name));
}

// Whether a key belongs to an input method, such as one for Japanese: it chooses text there, and does nothing else.
// When Enter ends the composition, Safari tells so by the key code only.
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

// Copies text, and briefly shows on the button whether that succeeded.
export async function copy(text, button) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copied = copyBySelection(text); // no clipboard API outside of localhost and https
  }
  const label = button.getAttribute("aria-label");
  button.classList.add(copied ? "done" : "failed");
  button.setAttribute("aria-label", copied ? "Copied" : "Could not copy");
  setTimeout(() => {
    button.classList.remove("done", "failed");
    button.setAttribute("aria-label", label);
  }, 1500);
}

function copyBySelection(text) {
  const area = element("textarea", { class: "offscreen", readonly: true });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  try {
    return document.execCommand("copy");
  } finally {
    area.remove();
    focused?.focus();
  }
}

export function number(value) {
  return value.toLocaleString("en");
}

// "0.42 s", "12.3 s", "3 min 5 s"
export function seconds(milliseconds) {
  const value = milliseconds / 1000;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  const whole = Math.round(value);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
