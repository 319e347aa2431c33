// How much of the model's context a conversation takes.

import { number } from "./dom.js";

// path: the messages on the screen. context: the model's, in tokens; null if it is not known.
export function drawContext(meter, path, context) {
  const used = path.findLast((message) => message.usage)?.usage;
  const tokens = used ? used.prompt + used.completion : 0;
  meter.hidden = !tokens;
  const share = context ? Math.min(1, tokens / context) : 0;
  meter.querySelector(".text").textContent =
    context ? `${number(tokens)} of ${number(context)} tokens of context` : `${number(tokens)} tokens of context`;
  const bar = meter.querySelector(".bar");
  bar.hidden = !context;
  bar.firstElementChild.style.width = `${share * 100}%`;
  bar.classList.toggle("nearly-full", share > 0.9);
}
