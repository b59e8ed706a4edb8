"""Help texts that fit a screen: the main options with a description, and the names of the other options by group."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from typing import Annotated, Any

import typer
import typer.core

GROUP_TITLES = {
    "task": "Rows and masks",
    "rendering": "Template",
    "rows": "Rows and masks",
    "selection": "Rows to read",
    "layout": "Splits and packing",
    "rejects": "Invalid rows",
    "source": "Files",
}
"""Group of options -> heading in help texts."""

_MAX_WIDTH, _MAX_LINES, _NAME_WIDTH = 80, 40, 24
_OPTIONS, _ARGUMENTS = "Options", "Arguments"


class CompactCommand(typer.core.TyperCommand):
    """A command whose help fits a screen. If the descriptions of all options do not, some groups list only names."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the complete help text if it fits a screen, or else the short help text."""
        text = render_help(ctx, is_complete=True)
        if text.count("\n") > _MAX_LINES:
            text = render_help(ctx, is_complete=False)
        formatter.write(text)


class CompactGroup(typer.core.TyperGroup):
    """A group of commands whose help lists each command on one line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text."""
        formatter.width = min(formatter.width, _MAX_WIDTH)
        formatter.write_usage(ctx.command_path, "[OPTIONS] COMMAND")
        formatter.write_paragraph()
        formatter.write_text(self.help or "")
        with formatter.section(_OPTIONS):
            formatter.write_dl([_describe(parameter, ctx) for parameter in self.get_params(ctx)], col_max=_NAME_WIDTH)
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summarize(command)) for name, command in commands], col_max=_NAME_WIDTH)


def _summarize(command: Any) -> str:
    """Return the first sentence of the help text of a command, without a remark in parentheses."""
    return str(command.help or "").strip().partition(". ")[0].partition(" (")[0].partition("\n\n")[0].rstrip(".")


def render_help(ctx: Any, *, is_complete: bool) -> str:
    """Return the help text of a command.

    Args:
        ctx: the click context of the command.
        is_complete: whether to describe the options of all groups, not only the main options.
    """
    formatter = ctx.make_formatter()
    formatter.width = min(formatter.width, _MAX_WIDTH)
    groups: dict[str, list[Any]] = defaultdict(list)
    for parameter in ctx.command.get_params(ctx):
        is_option = parameter.param_type_name == "option"
        group = getattr(parameter, "rich_help_panel", None) or _OPTIONS
        if parameter.name != "help_all" or not is_complete:
            groups[group if is_option else _ARGUMENTS].append(parameter)
    names = [_name_argument(parameter) for parameter in groups[_ARGUMENTS]]
    formatter.write_usage(ctx.command_path, " ".join([*names, "[OPTIONS]"]))
    formatter.write_paragraph()
    formatter.write_text(ctx.command.help or "")
    unlisted_groups = dict[str, list[Any]]()
    for title in dict.fromkeys((_ARGUMENTS, _OPTIONS, *groups)):
        if groups[title] and (is_complete or title in (_ARGUMENTS, _OPTIONS)):
            with formatter.section(title):
                formatter.write_dl([_describe(parameter, ctx) for parameter in groups[title]], col_max=_NAME_WIDTH)
        elif groups[title]:
            unlisted_groups[title] = groups[title]
    if unlisted_groups:
        formatter.write_paragraph()
        formatter.write("More options (see --help-all):\n")
        for title, options in unlisted_groups.items():
            listed = " ".join(option.opts[0] for option in options)
            lines = textwrap.wrap(listed, formatter.width - _NAME_WIDTH, break_on_hyphens=False)
            for number, line in enumerate(lines):
                formatter.write(f"  {'' if number else title:{_NAME_WIDTH - 2}}{line}\n")
    return str(formatter.getvalue())


def _name_argument(parameter: Any) -> str:
    name = f"{parameter.metavar or str(parameter.name).upper()}{'...' if parameter.nargs == -1 else ''}"
    return name if parameter.required else f"[{name}]"


def _describe(parameter: Any, ctx: Any) -> tuple[str, str]:
    """Return the names of a parameter, and its help text with the default value."""
    text = parameter.help or ""
    if parameter.param_type_name != "option":
        return _name_argument(parameter).strip("[]"), text
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.secondary_opts:
        names = f"{names}/{parameter.secondary_opts[0].removeprefix('--')}"
    show_default = parameter.show_default
    default = show_default if isinstance(show_default, str) else None
    if show_default is True and not parameter.is_flag and "default:" not in text:
        value = parameter.get_default(ctx)
        default = None if value is None else str(value)
    return names, f"{text} (default: {default})" if default else text


def _print_complete_help(ctx: typer.Context, value: bool) -> None:
    if value:
        print(render_help(ctx, is_complete=True).rstrip())
        raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_print_complete_help, help="Describe all options")
]
"""The type of the parameter `help_all` of commands with many options."""
