"""Suggestions for flags that a command does not have, such as another program's flag for the same option."""

from __future__ import annotations

import click

from npqwen.checks import choice, near_names
from npqwen.generation.options import ELSEWHERE

_ELSEWHERE = {
    **ELSEWHERE,
    **dict.fromkeys(("c", "ctx_size", "num_ctx", "n_ctx", "context_size", "context_length", "max_kv_size"), "context"),
    **dict.fromkeys(("num_threads", "n_threads", "num_thread"), "threads"),
    **dict.fromkeys(("sys", "system_prompt", "system_message"), "system"),
    **dict.fromkeys(("thinking", "enable_thinking", "reasoning"), "think"),
    **dict.fromkeys(("q_bits", "quantize", "quantization"), "bits"),
    **dict.fromkeys(("n_prompt",), "prefill"),
    **dict.fromkeys(("n_gen",), "decode"),
    **dict.fromkeys(("n_depth",), "depth"),
    **dict.fromkeys(("r", "repetitions"), "repeat"),
    **dict.fromkeys(("silent",), "quiet"),
}
"""Flags of ollama, llama.cpp, mlx-lm, llm and transformers, without dashes and with "_" -> the flag here."""

_ARGUMENTS = {
    **dict.fromkeys(("m", "model", "hf", "hf_repo"), "model"),
    **dict.fromkeys(("p", "prompt"), "prompt"),
    **dict.fromkeys(("f", "file"), "file"),
    **dict.fromkeys(("rev", "revision"), "revision"),
}
"""Such flags -> what is an argument here, a part of one, or read from stdin."""

_PROMPTS = ("prompt", "question")
"""Arguments that are text for the model; it may come from stdin, too."""


def hint(ctx: click.Context, flag: str) -> str:
    """What to type instead of `flag`, which the command of `ctx` does not have; empty if nothing is close.

    A flag of another program that means one of the command's comes first, then one that `flag` abbreviates, then the
    closest one.
    """
    usage = " ".join([ctx.command_path, *ctx.command.collect_usage_pieces(ctx)[1:]])
    arguments = {parameter.name for parameter in ctx.command.params if isinstance(parameter, click.Argument)}
    takes_text = any(name in arguments for name in _PROMPTS)
    meant = _ARGUMENTS.get(flag.strip("-").replace("-", "_"))
    if (meant == "model" and meant in arguments) or (meant == "prompt" and takes_text):
        return f"it is an argument without a flag: {usage}"
    if meant == "file" and takes_text:
        return f"the text of a file is read from stdin: {usage.replace('PROMPT', '-')} < FILE"
    if meant == "revision" and arguments & {"model", "source"}:
        return "a revision is written after the model's name: Qwen/Qwen3-0.6B@main"
    flags = _long_flags(ctx)
    if flag == "--verbose" and "quiet" in flags:
        return "statistics are shown unless --quiet is given"
    near = [flags[name] for name in near_names(flag, flags, _ELSEWHERE)]
    return f"did you mean {choice(list(dict.fromkeys(near)))}?" if near else ""


def value_hint(error: click.BadParameter) -> str:
    """What to type instead of an option with a wrong value, if another program's option is likely to be meant."""
    if error.ctx is None or error.param is None or "-s" not in error.param.opts:
        return ""
    return "the system message is --system" if "system" in _long_flags(error.ctx) else ""


def _options(ctx: click.Context) -> list[click.Option]:
    """The command's options that its help shows."""
    return [one for one in ctx.command.get_params(ctx) if isinstance(one, click.Option) and not one.hidden]


def _long_flags(ctx: click.Context) -> dict[str, str]:
    """A command's long flags, by their names without dashes and with "_" -> the flag to suggest.

    Of a flag with several spellings, that is the longest one.
    """
    found: dict[str, str] = {}
    for option in _options(ctx):
        for spellings in (option.opts, option.secondary_opts):
            long = [flag for flag in spellings if flag.startswith("--")]
            found |= {flag[2:].replace("-", "_"): max(long, key=len) for flag in long}
    return found
