"""`--config FILE.yaml`: options from a file."""

from pathlib import Path
from typing import Any

import typer

from stereo_cli.terminal import BAD_INPUT, fail

#: Bytes of a --config, and lists in it: the time of the YAML parser grows with the square of nested ones.
MOST_CONFIG, MOST_LISTS = 2**16, 200
#: Options that a file may not give: whoever sends one would run code.
ON_THE_COMMAND_LINE = ("allow_code",)


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Options from a YAML file become defaults, so that a flag on the command line wins."""
    if path is None:
        return None
    given = _parsed(path)
    if not isinstance(given, dict):
        fail(f"--config {path}: expected a mapping of options to values", BAD_INPUT)
    known: dict[str, Any] = {}
    for parameter in ctx.command.params:
        flags = [flag[2:] for flag in parameter.opts if flag.startswith("--")] or [parameter.name]
        known |= {flag.replace("-", "_"): parameter for flag in flags if flag not in ("config", "help")}
    options = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in known:
            there = ", ".join(sorted(flag.replace("_", "-") for flag in known))
            fail(f"--config {path}: no option {key!s:.80}; choose one of {there}", BAD_INPUT)
        if name in ON_THE_COMMAND_LINE:
            fail(f"--config {path}: {key}: give this on the command line only; remove it from the file", BAD_INPUT)
        repeats = known[name].multiple or known[name].nargs == -1
        values = value if repeats and isinstance(value, list) else [value]
        if not all(isinstance(each, str | int | float | None) for each in values):
            fail(
                f"--config {path}: {key}: expected {'values' if repeats else 'one value'}, not {type(value).__name__}",
                BAD_INPUT,
            )
        options[known[name].name] = [value] if repeats and not isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **options}
    return path


def _parsed(path: Path) -> Any:
    """What a YAML file holds, of texts, numbers, true and false, lists and tables alone."""
    import yaml

    from stereoclinic.errors import InputError
    from stereoclinic.io.reading import check_plain, read_text

    # A name for a part can stand for any number of copies of it, and a tag asks for other things than plain ones.
    refused = {
        yaml.AliasToken: "an alias (*NAME)", yaml.AnchorToken: "an anchor (&NAME)", yaml.TagToken: "a tag (!NAME)",
        yaml.DirectiveToken: "a directive (%NAME)",
    }  # fmt: skip
    try:
        text = read_text(path, "--config", MOST_CONFIG)
        if text.count("[") + text.count("{") > MOST_LISTS:
            fail(f"--config {path}: more than {MOST_LISTS} lists or mappings; options need fewer", BAD_INPUT)
        for token in yaml.scan(text, yaml.SafeLoader):
            if (what := refused.get(type(token))) is not None:
                fail(f"--config {path}: {what} is not supported; write the value itself", BAD_INPUT)
        given = yaml.safe_load(text) or {}
        check_plain(given, finite=True)
    except InputError as error:
        fail(str(error), BAD_INPUT)
    except typer.Exit:
        raise
    except Exception as error:  # the parser has as many errors as there are kinds of values
        fail(f"--config {path}: {str(error)[:300] or type(error).__name__}", BAD_INPUT)
    return given
