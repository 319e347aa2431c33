"""Suggestions for flags that a command does not have, such as another program's flag for the same option."""

from __future__ import annotations

import shlex

import click

from npqwen.checks import near_names
from npqwen.generation.options import ELSEWHERE
from npqwen.wording import alternatives, shortened

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
_MESSAGES = "chat"
"""The command that has the options of messages, which `generate` lacks."""


def hint(ctx: click.Context, flag: str) -> str:
    """What to type instead of `flag`, which the command of `ctx` does not have; empty if nothing is close.

    A flag of another program that means one of the command's comes first, then one that `flag` abbreviates, then the
    closest one.
    """
    usage = " ".join([ctx.command_path, *ctx.command.collect_usage_pieces(ctx)[1:]])
    arguments = {parameter.name for parameter in ctx.command.params if isinstance(parameter, click.Argument)}
    has_text = takes_text(ctx.command) is not None
    meant = _ARGUMENTS.get(flag.strip("-").replace("-", "_"))
    if (meant == "model" and meant in arguments) or (meant == "prompt" and has_text):
        return f"it is an argument without a flag: {usage}"
    if meant == "file" and has_text:
        return f"the text of a file is read from stdin: {usage.replace('PROMPT', '-')} < FILE"
    if meant == "revision" and arguments & {"model", "source"}:
        return "a revision is written after the model's name: Qwen/Qwen3-0.6B@main"
    flags = _long_flags(ctx)
    if flag == "--verbose" and "quiet" in flags:
        return "statistics are shown unless --quiet is given"
    if ctx.command.name == "generate" and _meant(flag) not in flags and _meant(flag) in _flags_of(_MESSAGES, ctx):
        return f"it is an option of npqwen {_MESSAGES}"
    near = [flags[name] for name in near_names(flag, flags, _ELSEWHERE)]
    return f"did you mean {alternatives(list(dict.fromkeys(near)))}?" if near else ""


def takes_text(command: click.Command) -> str | None:
    """The name of the command's argument that is text for the model; None if it has none."""
    names = [parameter.name for parameter in command.params if isinstance(parameter, click.Argument)]
    return next((name for name in names if name in _PROMPTS), None)


def unquoted(ctx: click.Context, name: str, more: list[str]) -> str:
    """The error of a command line whose text for the model has several words and no quotes.

    name: of the argument. more: what follows its first word.
    """
    words = " ".join([ctx.params[name], *more])
    before = [ctx.params[one.name or ""] for one in ctx.command.params if isinstance(one, click.Argument)]
    line = shlex.join([*before[:-1], shortened(words)])
    return f"the {name} has several words, so put it in quotes: {ctx.command_path} {line}"


def value_hint(error: click.BadParameter) -> str:
    """What to type instead of an option with a wrong value, if another program's option is likely to be meant."""
    if error.ctx is None or error.param is None or "-s" not in error.param.opts:
        return ""
    return "the system message is --system" if "system" in _long_flags(error.ctx) else ""


def _meant(flag: str) -> str:
    """The name here of a flag, without dashes and with "_"."""
    name = flag.strip("-").lower().replace("-", "_")
    return _ELSEWHERE.get(name, name)


def _flags_of(command: str, ctx: click.Context) -> dict[str, str]:
    """`_long_flags` of another command."""
    root = ctx.find_root()
    found = root.command.get_command(root, command) if isinstance(root.command, click.Group) else None
    return {} if found is None else _long_flags(click.Context(found, parent=root))


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
