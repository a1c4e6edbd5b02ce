"""The options of `secateur shrink`."""

from dataclasses import dataclass

import click

from secateur.cli.options import amount, at_most_one, gathered, option_name

# Their options, and the help of each.
AMOUNTS = {
    "intermediate": "channels of each feed-forward network",
    "heads": "query heads of each layer; where some share a KV head, of those of each KV head",
    "kv_heads": "KV heads of each layer, with all their query heads",
    "experts": "experts of each layer",
}


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of layers, such as 3,7") from None


@dataclass(frozen=True)
class ShrinkOptions:
    """What to remove, and by what."""

    model: str
    out: str
    intermediate: float | None
    heads: float | None
    kv_heads: float | None
    experts: float | None
    layers: int | None
    drop_layers: list[int] | None
    align: int | None
    statistics: str | None

    def check(self) -> None:
        """Refuses options that do not fit.

        Raises:
            click.UsageError: The message names them.
        """
        at_most_one(heads=self.heads, kv_heads=self.kv_heads)
        at_most_one(layers=self.layers, drop_layers=self.drop_layers)
        if not self.is_sent and self.layers is None and self.drop_layers is None:
            raise click.UsageError(
                "an amount is required, such as --intermediate 0.3 or --layers 2"
            )
        for name in AMOUNTS:
            if getattr(self, name) == 0:
                raise click.UsageError(f"{option_name(name)} 0 removes nothing: leave it out")
        if self.align is not None and self.intermediate is None:
            raise click.UsageError("--align is for channels: give --intermediate")

    @property
    def is_sent(self) -> bool:
        """Whether a server cuts tensors."""
        return any(getattr(self, name) is not None for name in AMOUNTS)


shrink_options = gathered(
    ShrinkOptions,
    "options",
    click.argument("model", metavar="FOLDER", type=click.Path()),
    click.option(
        "-o", "--out", type=click.Path(), metavar="OUT", required=True, help="the folder to make"
    ),
    *(
        click.option(
            option_name(name),
            metavar="AMOUNT",
            type=amount,
            help=f"how many to remove of the {units}",
        )
        for name, units in AMOUNTS.items()
    ),
    click.option(
        "--layers",
        metavar="COUNT",
        type=int,
        help="remove so many layers: the least influential, or those before the last one",
    ),
    click.option(
        "--drop-layers", metavar="LAYER,...", type=_numbers, help="remove these; 0 is the first"
    ),
    click.option(
        "--align",
        metavar="COUNT",
        type=int,
        help="keep a multiple of this many channels (default: up to 16)",
    ),
    click.option(
        "--statistics",
        metavar="FILE",
        type=click.Path(),
        help="choose by what secateur.calibrate collected, and not by weights",
    ),
)
