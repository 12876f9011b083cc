"""`steer completion SHELL`: a script that completes commands, options and the names of things.

jsonargparse's own completion (`--print_shtab-bash`) needs one parser with all commands; this is a
table of words.
"""

from typing import Literal

from recipes.arguments import option_names
from recipes.commands import COMMANDS
from recipes.terminal import say

__all__ = ["completion"]

SCRIPT = """_steer() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    case "$before" in
        --method) COMPREPLY=($(compgen -W "{methods}" -- "$word")); return;;
        --model) COMPREPLY=($(compgen -f -W "{models}" -- "$word")); return;;
        --objective) COMPREPLY=($(compgen -W "{objectives}" -- "$word")); return;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word")); return
    fi
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
}}
complete -o default -F _steer steer"""


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a completion script for a shell; `source` it in ~/.bashrc or ~/.zshrc.

    Args:
        shell: bash or zsh.
    """
    import steer

    options: dict[str, list[str]] = {}
    for command in COMMANDS:
        known = ["--" + name.replace("_", "-") for name in option_names(command)]
        listed = options.setdefault(command.split()[0], ["--help"])
        listed += [name for name in known if name not in listed]
    cases = [
        f'        {name}) COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$word"));;'
        for name, words in options.items()
    ]
    script = SCRIPT.format(
        methods=" ".join(steer.METHODS),
        models=" ".join(steer.MODELS),
        objectives=" ".join(steer.OBJECTIVES),
        commands=" ".join(options),
        options="\n".join(cases),
    )
    lead = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    say(lead + script)
