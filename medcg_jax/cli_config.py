"""`medcg config`: every setting of a config file, or all config files; `medcg completion`: for a shell."""

import difflib
import shutil

from medcg_jax.cli_parser import Parser, add, completion
from medcg_jax.config import ConfigError, RunConfig
from medcg_jax.config_fields import fields_of, lines_of
from medcg_jax.config_list import FOLDER, listing, project_files, read

MOST_COLUMNS = 120


def add_config_flags(verb: Parser) -> None:
    """Adds --config, and below the verb's flags the config files that can be named."""
    verb.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:ARG]",
        help="what to run, one of those below or your own; --config.KEY=VALUE sets one of its fields, which "
        "`medcg config FILE.py` lists",
    )
    verb.tail = config_help


def config_help() -> str:
    """The config files with their arguments, for the end of a verb's help."""
    files = [read(path) for path in project_files()]
    args = {arg: None for file in files if file.has_many for arg in file.args}
    return "\n".join(
        ["config files, from any folder (`medcg config` says what each is for):"]
        + [f"  {file.form}" for file in files]
        + [f"  ARG: {', '.join(args)}"]
    )


def add_config(verbs, top: Parser) -> None:
    """Adds the verbs `config` and `completion`."""
    config = add(verbs, "config", run_config, "every setting of a config file; without FILE, the config files")
    config.add_argument(
        "config", nargs="?", default="", metavar="FILE.py[:ARG]", help="may stand with --config.KEY=VALUE"
    )
    config.add_argument("--grep", default="", metavar="WORD", help="settings whose name or meaning has it, only")
    shell = add(verbs, "completion", lambda args: print_completion(args, top), "completes words in a shell")
    shell.add_argument("shell", choices=("bash", "zsh"), help="source <(medcg completion bash)")


def run_config(args) -> dict:
    if not args.config:
        if args.grep or args.overrides:
            raise ConfigError("medcg config: expected a FILE.py with --grep and --config.KEY=VALUE")
        print("\n".join(listing()))
        return {"configs": [read(path).form for path in project_files()]}
    from medcg_jax.config_file import load

    infos = fields_of(load(args.config, args.overrides))
    chosen = [info for info in infos if info.matches(args.grep)]
    if not chosen:
        words = {word for info in infos for word in info.key.replace("_", ".").split(".")}
        close = difflib.get_close_matches(args.grep, sorted(words), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"--grep={args.grep}: no setting has it in its name or meaning{hint}")
    print("\n".join(lines_of(chosen, min(MOST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 40)).columns))))
    return {"config": args.config, "fields": [info.as_dict() for info in chosen]}


def print_completion(args, top: Parser) -> dict:
    files = [read(path) for path in project_files()]
    words = [f"{FOLDER}/{file.path.name}{arg and ':' + arg}" for file in files for arg in ("", *file.args)]
    script = completion(args.shell, top, words, [info.key for info in fields_of(RunConfig())])
    print(script, end="")
    return {"shell": args.shell, "script": script}
