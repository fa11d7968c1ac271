"""`beatless completion`: what a shell must know to complete commands, options and plans."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command(
    epilog='bash: add  eval "$(beatless completion bash)"  to ~/.bashrc; zsh the same with zsh '
    "to ~/.zshrc; fish: beatless completion fish > ~/.config/fish/completions/beatless.fish"
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script by which SHELL completes commands, options and plans."""
    found = get_completion_class(shell)
    assert found is not None  # noqa: S101 - Click has all three
    root = context.find_root()
    click.echo(found(root.command, {}, "beatless", "_BEATLESS_COMPLETE").source())
