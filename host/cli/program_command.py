"""A verb that runs a program, whose own options go behind `--`."""

from __future__ import annotations

import click


class ProgramCommand(click.Command):
    """Says where the program's options go to who gave one in the wrong place."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(
                f"{error.format_message()}\nAn option of the program goes behind `--`: "
                f"piehost {ctx.info_name} ... PROGRAM -- {error.option_name}",
                ctx,
            ) from None
