"""What the documentation takes from the code as it is built, and what is looked at beside mkdocs' own checks.

    <!-- commands -->          the reference of every command, from the typer app itself
    <!-- public names -->      a row for each name of `stereoclinic.__all__`, linked to where it is documented
    <!-- modules: NAME -->     every module of a package, from its docstrings

Formulas become MathML, which browsers draw by themselves; one that cannot be read is a warning, as is a link to the
outside that is not of the form https://host/.... Warnings fail a strict build.
"""

import ast
import html
import logging
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
TOOLKIT = ROOT / "toolkit"
log = logging.getLogger("mkdocs.plugins.stereoclinic")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith("results/"):
        page.meta["hide"] = ["toc"]  # tables of figures need the room
        markdown = re.sub(r"(?<=\d) (\[-?[\d.]+), (?=-?[\d.]+\])", "\u00a0\\1,\u00a0", markdown)
        markdown = re.sub(r"(?<=\d) (?=±\d)", "\u00a0", markdown)
        markdown = re.sub(r"(?<=\d) / (?=-?[\d\u2013])", "\u00a0/\u00a0", markdown)
    markdown = markdown.replace("<!-- commands -->", "" if "<!-- commands -->" not in markdown else commands())
    markdown = markdown.replace("<!-- public names -->", public_names())
    return re.sub(r"<!-- modules: ([\w.]+) -->", lambda match: modules(match[1]), markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    for link in re.findall(r'(?:href|src)="([^"]+)"', content):
        if fault := link_fault(html.unescape(link)):
            log.warning("%s: link %s %s", page.file.src_uri, link, fault)

    def formula(match: re.Match[str]) -> str:
        from latex2mathml.converter import convert

        text = html.unescape(match[2]).strip()
        try:
            return convert(text[2:-2], display="block" if match[1] == "div" else "inline")
        except Exception as error:  # each kind of mistake has an error of its own
            log.warning("%s: formula %s cannot be read: %r", page.file.src_uri, text, error)
            return match[0]

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)


def link_fault(link: str) -> str | None:
    """What is wrong with a link to the outside, told without the network; mkdocs itself looks at the others."""
    parts = urlsplit(link)
    if not parts.scheme and not parts.netloc:
        return None
    if parts.scheme != "https":
        return "leads outside, and not by https"
    if not re.fullmatch(r"(?:[a-z0-9-]+\.)+[a-z]{2,}", parts.netloc) or re.search(r"[\s<>]", link):
        return "is no address"
    return None


def modules(package: str) -> str:
    """A section for each module of a package, or for the one module of that name."""
    folder = TOOLKIT.joinpath(*package.split("."))
    if folder.is_dir():
        names = [package, *(f"{package}.{path.stem}" for path in sorted(folder.glob("[a-z]*.py")))]
    else:
        names = [package]
    return "\n\n".join(f"::: {name}\n    options:\n      heading_level: 2" for name in names)


def public_names() -> str:
    """A table of the names that `import stereoclinic` offers, with the first sentence of each."""
    stub = ast.parse((TOOLKIT / "stereoclinic/__init__.pyi").read_text())
    homes = {node.names[0].name: str(node.module) for node in stub.body if isinstance(node, ast.ImportFrom)}
    rows = ["| name | what it is |", "| --- | --- |"]
    for name in sorted(homes):
        home, said = _documented(f"stereoclinic.{homes[name]}", name)
        rows.append(f"| [`{name}`][{home}.{name}] | {_cell(said)} |")
    return "\n".join(rows)


def _documented(module: str, name: str) -> tuple[str, str]:
    """The module that defines a name, which may be another than the one that hands it out, and its first sentence."""
    path = TOOLKIT.joinpath(*module.split("."))
    path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    body = ast.parse(path.read_text()).body
    for node in body:
        if getattr(node, "name", "") == name:
            return module, (ast.get_docstring(node) or "").split("\n\n")[0]  # type: ignore[arg-type]
    given = [node for node in body if isinstance(node, ast.ImportFrom) and name in [each.name for each in node.names]]
    return _documented(str(given[0].module), name)


def commands() -> str:
    """The reference of every command."""
    sys.path[:0] = [str(TOOLKIT), str(ROOT / "cli")]
    import typer

    from stereo_cli.main import app

    return "\n\n".join(command_section(name, command) for name, command in leaves(typer.main.get_command(app)).items())


def leaves(group: Any, before: str = "") -> dict[str, Any]:
    """The commands of a group by their whole names, such as "bench" and "reader check"."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        whole = f"{before}{name}"
        found |= leaves(command, f"{whole} ") if hasattr(command, "commands") else {whole: command}
    return found


def command_section(name: str, command: Any) -> str:
    """A command: what it does, its arguments, and its options, a table for each panel of its help."""
    parts = [f"## stereo {name}", _help_text(command.help or "")]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    names = {each: each.metavar or each.name.upper() for each in arguments}
    parts.append("```text\n" + " ".join([f"stereo {name} [OPTIONS]", *names.values()]) + "\n```")
    parts += [f"`{names[each]}`: {_cell(each.help or '')}" for each in arguments]
    panels = dict.fromkeys([None, *(each.rich_help_panel for each in options)])  # the unnamed one first, as in --help
    for panel in panels:
        rows = ["| option | what it does | default |", "| --- | --- | --- |"]
        for each in options:
            if each.rich_help_panel == panel:
                flags = ", ".join(f"`{flag}`" for flag in (*each.opts, *each.secondary_opts))
                rows.append(f"| {flags} | {_cell(each.help or '')} | {_cell(_default(each))} |")
        parts += [f"**{panel}**"] if panel else []
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    value = option.default
    if value is None or value is False or not option.show_default:
        return ""
    return f"`{value}`"


def _cell(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _help_text(text: str) -> str:
    """A docstring as Markdown: what is marked by \\b, which keeps its lines, becomes a block of code."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if block.lstrip().startswith("\b"):
            blocks.append("```text\n" + block.replace("\b", "").strip("\n") + "\n```")
        else:
            blocks.append(html.escape(block, quote=False))
    return "\n\n".join(blocks)
