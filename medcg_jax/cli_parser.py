"""The parser of the verbs: errors in one line with what was nearly right, unknown flags, completion for shells."""

import argparse
import difflib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from medcg_jax.config import ConfigError

BASH = """\
# Completion of medcg's verbs, flags and config files, for bash and zsh:
#   source <(medcg completion bash)      or zsh; once a shell, or in ~/.bashrc or ~/.zshrc
_medcg_words() {{
    case "$1" in
{cases}
    esac
}}
_medcg() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" word verb="" key="" candidate
    word="${{line##* }}"
    for candidate in ${{line% *}}; do
        case "$candidate" in medcg | -* | */*) continue ;; esac
        case " $verb" in " " | " data") verb="${{verb:+$verb }}$candidate" ;; esac
    done
    [ "$line" = "${{line#* }}" ] && word=""
    COMPREPLY=($(compgen -W "$(_medcg_words "$verb")" -- "$word"))
    case "$word" in
        --*=*) [ ${{#COMPREPLY[@]}} -gt 0 ] || COMPREPLY=($(compgen -P "${{word%%=*}}=" -f -- "${{word#*=}}")) ;;
        -*) ;;
        *) COMPREPLY+=($(compgen -f -- "$word")) ;;
    esac
    # bash replaces only what follows the last = or : of the word.
    if [ -z "${{ZSH_VERSION:-}}" ]; then
        key="${{word%"${{word##*[=:]}}"}}"
        COMPREPLY=("${{COMPREPLY[@]#"$key"}}")
        case "${{COMPREPLY[0]:-}}" in *=) compopt -o nospace 2>/dev/null || true ;; esac
    fi
}}
complete -o nosort -F _medcg medcg 2>/dev/null || complete -F _medcg medcg
"""
ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the choice that was nearly given.

    tail: gives further lines for the end of its help; None: there are none. Called when help is printed only.
    """

    tail: Callable[[], str] | None = None

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.tail()}\n" if self.tail else "")

    def error(self, message: str):
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        if action.choices is None or value in action.choices:
            return
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}expected one of {', '.join(choices)}")


class Version(argparse.Action):
    """Prints the package's version, with those of Python and JAX, and ends the process."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        import platform

        def installed(name: str) -> str:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                return "not installed"

        print(f"medcg {installed('medcg-jax')} (Python {platform.python_version()}, JAX {installed('jax')})")
        parser.exit()


def add(verbs, name: str, run, text: str) -> Parser:
    """Adds a verb. run: called with its arguments; returns the result, which --json writes. text: its line of help."""
    verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    text = "also write the result as one JSON object; -: to standard output, all else to standard error"
    verb.add_argument("--json", default="", metavar="FILE", help=text)
    verb.set_defaults(run=run, parser=verb)
    return verb


def add_amount(verb: Parser) -> None:
    """Adds the flags that say how much is shown."""
    amount = verb.add_mutually_exclusive_group()
    amount.add_argument("--quiet", action="store_true", help="show results and warnings alone, no progress")
    amount.add_argument("--verbose", action="store_true", help="also show XLA's flags and what libraries say")


def unknown_flag(flag: str, parser: Parser, has_config: bool) -> ConfigError:
    """The refusal of a flag that a verb does not know, with the flag or the field of the config that was meant.

    has_config: the verb reads a config, whose fields `--config.KEY=VALUE` sets.
    """
    name, key = flag.partition("=")[0], flag.partition("=")[0].lstrip("-")
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    close = [name] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    fields: list[str] = []
    if has_config:
        from medcg_jax.config_file import close_fields

        key = key.removeprefix("config.")
        fields = [field for field in close_fields(key.rpartition(".")[2]) if field.endswith(key) or "." not in key]
    meant = " or ".join(close or [f"--config.{field}" for field in fields])
    if name in known:
        return ConfigError(f"{flag}: expected behind the verb, `{parser.prog} {flag}`")
    hint = f"did you mean {meant}? " if meant else ""
    return ConfigError(f"{flag} is not known to `{parser.prog}`; {hint}see `{parser.prog} --help`")


def completion(shell: str, parser: Parser, config_words: Sequence[str], fields: Sequence[str]) -> str:
    """A script that completes medcg's verbs, flags and config files in a shell, bash or zsh.

    config_words: config files with their arguments. fields: names of the config's fields.
    """
    cases = []
    for path, words in _words(parser):
        if "--config=" in words:
            words = [
                *words,
                *(f"--config={word}" for word in config_words),
                *(f"--config.{field}=" for field in fields),
            ]
        cases.append(f'        "{path}") echo "{" ".join(words)}" ;;')
    return (ZSH if shell == "zsh" else "") + BASH.format(cases="\n".join(cases))


def _words(parser: Parser, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """(verb, words that may follow it) of a parser and all below it; "" is the command itself."""
    words: list[str] = []
    below: list[tuple[str, list[str]]] = []
    for action in parser._actions:
        flags = [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            words += action.choices
            for name, verb in action.choices.items():
                below += _words(verb, f"{path} {name}".strip())
        elif flags and action.choices:
            words += [f"{flags[0]}={choice}" for choice in action.choices]
        elif not flags:
            words += map(str, action.choices or ())
        else:
            words += [flag if action.nargs == 0 else f"{flag}=" for flag in flags]
    yield path, words
    yield from below
