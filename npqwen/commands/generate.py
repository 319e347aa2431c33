"""The command `npqwen generate`."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from npqwen.commands.loading import (
    Loading,
    adapter_option,
    draft_option,
    model_options,
    open_model,
    prefix_cache_options,
)
from npqwen.commands.options import Command, argument_text, generation_options, keyboard_notice, stdin_text
from npqwen.generation.options import check_options
from npqwen.terminal.terminal import Terminal
from npqwen.wording import counted

if TYPE_CHECKING:

    from npqwen.generation.stream import Stream


@click.command(cls=Command)
@click.argument("model")
@click.argument("prompt")
@generation_options({})
@draft_option
@adapter_option
@prefix_cache_options
@model_options
def generate(
    model: str,
    prompt: str,
    loading: Loading,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue PROMPT: the text to stdout, statistics to stderr.

    PROMPT is raw text, without a chat template; - reads it from stdin, without its last line break. By default,
    sampling is as the model's authors recommend (generation_config.json). With --adapter the text uses that adapter,
    the first of several.
    """
    from npqwen.generation.decoding import check_prompt
    from npqwen.generation.generate import stream

    terminal = Terminal(quiet=quiet)
    prompt = stdin_text(terminal, keyboard_notice("the prompt")) if prompt == "-" else argument_text(prompt)
    prompt = check_prompt(prompt)
    options["adapter"] = loading.first_adapter
    check_options(options)
    with (
        terminal,
        closing(open_model(model, loading, terminal, purpose="text")) as loaded,
    ):
        from npqwen.terminal.answer_text import answer_text

        pieces = stream(loaded, prompt, progress=terminal.prompt_progress, **options)
        text = answer_text(terminal, exact=True)
        complete = False
        try:
            for piece in pieces:
                text.add(piece)
            complete = True
        finally:
            text.close(complete=complete)
        terminal.notice(_statistics(pieces))


def _statistics(stream: Stream) -> str:
    from npqwen.terminal.answer_view import decode_speed, draft_tokens

    usage = stream.usage
    if stream.stop_string is not None:
        end = f"stopped at {stream.stop_string!r}"
    elif stream.finish_reason == "stop":
        end = "the text ended"
    elif stream.finish_reason == "loop":
        end = "the text repeated itself"
    else:
        end = "--max-tokens reached" if stream.max_tokens == usage.generated_tokens else "the context is full"
    speed = decode_speed(usage)
    cached = f", {usage.cached_tokens} of them cached," if usage.cached_tokens else ""
    return (
        f"prompt: {counted(usage.prompt_tokens, 'token')}{cached} in {usage.prefill_seconds:.2f} s, "
        f"{usage.prefill_rate:.1f} tok/s; text: {counted(usage.generated_tokens, 'token')}{draft_tokens(usage)}, "
        f"first after {usage.first_token_seconds:.2f} s{', then ' if speed else ''}{speed}; {end}"
    )
