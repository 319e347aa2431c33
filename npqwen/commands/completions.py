"""The command `npqwen completions`."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from npqwen.commands.options import Command
from npqwen.terminal.terminal import Terminal

_SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
_VARIABLE = "_NPQWEN_COMPLETE"


@click.command(cls=Command)
@click.argument("shell", type=click.Choice([*_SHELLS]))
@click.pass_context
def completions(ctx: click.Context, shell: str) -> None:
    """Print what makes Tab complete commands, options, and the models on this machine in bash, zsh or fish.

    \b
    bash: echo 'eval "$(npqwen completions bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(npqwen completions zsh)"' >> ~/.zshrc      (after compinit)
    fish: npqwen completions fish > ~/.config/fish/completions/npqwen.fish
    """
    command = ctx.find_root()
    script = _SHELLS[shell](command.command, {}, command.info_name or "npqwen", _VARIABLE)
    # Not source(): it runs bash to check its version, but that may not be the bash that evaluates this.
    Terminal().text(script.source_template % script.source_vars() + "\n")
