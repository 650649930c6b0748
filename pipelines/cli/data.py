"""Commands on data files: data check, data convert, tokens."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamachat.tables import plural
from pipelines.cli.launch import AllowUnproved, ColumnsOption, OverwriteOutOption, named_columns, reported

if TYPE_CHECKING:
    from llamachat.data.check import TokenLimit

log = logging.getLogger(__name__)


@reported
def tokens(
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="Folder with the tokenizer.", metavar="DIR")],
    dialogs: Annotated[Path, typer.Option("--in", help="File of dialogs.", metavar="FILE")],
    out: Annotated[
        Path, typer.Option("--out", help="File to write: input_ids and loss_mask of each dialog.", metavar="FILE")
    ],
    train_on: Annotated[
        Literal["every_answer", "last_answer"], typer.Option("--train-on", help="Which answers are trained on.")
    ] = "every_answer",
    show: Annotated[bool, typer.Option("--show", help="Print the dialogs with the trained tokens coloured.")] = False,
    allow_unproved: AllowUnproved = False,
    overwrite: OverwriteOutOption = False,
) -> None:
    """Write the token ids and loss mask of each dialog, as training sees them."""
    from llamachat.chat_format import TrainOn
    from llamachat.data.tokens import write_tokens

    done = write_tokens(
        tokenizer,
        dialogs,
        out,
        train_on=TrainOn(train_on),
        show=show,
        allow_unproved=allow_unproved,
        overwrite=overwrite,
    )
    if done.warning:
        log.warning("%s", done.warning)
    log.info(
        "%s: %s, %s, %d of them trained on",
        out,
        plural(done.dialogs, "dialog"),
        plural(done.tokens, "token"),
        done.trained_tokens,
    )


@reported
def check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A .jsonl, .jsonl.gz or .parquet file, or a hub name.")],
    kind: Annotated[
        Literal["dialog", "preference", "prompt"] | None,
        typer.Option("--kind", help="Kind of record to expect; by default the most frequent kind."),
    ] = None,
    data_format: Annotated[
        str, typer.Option("--format", help="Format of the records: auto, native, or the name of a known set.")
    ] = "auto",
    columns: ColumnsOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Also compare each record's length in tokens with this recipe's base.max_tokens.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Check a data file. Faulty lines are listed by field, with the reason and the fix, then a summary of the file
    follows."""
    from llamachat.chat_format.llama2 import SPECIAL_TAGS
    from llamachat.data.check import check_path

    limit = None if config is None else _token_limit(config)
    report = check_path(path, kind, data_format, SPECIAL_TAGS, columns=named_columns(columns), limit=limit)
    print(report.text())
    if report.exit_status:
        raise typer.Exit(report.exit_status)


def _token_limit(config: Path) -> "TokenLimit":
    """The tokenizer of a recipe's base, and the number of tokens of a record that the recipe's steps read."""
    from llamachat.chat_format.proof import load_proved_format
    from llamachat.data.check import TokenLimit
    from llamachat.models.hub import tokenizer_folder
    from pipelines.recipe.recipe import load

    recipe = load(config)
    base = recipe.base
    chat_format, _ = load_proved_format(
        tokenizer_folder(base.model), chat_format=base.chat_format, allow_unproved=base.allow_unproved_tokenizer
    )
    for_prompts = base.max_tokens - recipe.sections.rollout.max_new_tokens
    return TokenLimit(chat_format, base.max_tokens, for_prompts, base.system)


@reported
def convert(
    path: Annotated[
        str, typer.Argument(metavar="IN", help="JSON Lines, a JSON array (.gz or not), .parquet, or a hub name.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write, in the native format: .jsonl or .jsonl.gz.")
    ],
    kind: Annotated[
        Literal["dialog", "preference", "prompt"] | None,
        typer.Option(
            "--kind", help="Kind of record to write; by default the most frequent kind among the first records."
        ),
    ] = None,
    data_format: Annotated[
        str, typer.Option("--format", help="Format of the records: auto, native, or the name of a known set.")
    ] = "auto",
    columns: ColumnsOption = None,
    overwrite: OverwriteOutOption = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Write nothing if a record cannot be repaired; by default such records are dropped."
        ),
    ] = False,
    plain_text: Annotated[
        bool, typer.Option("--plain-text", help="Convert HTML in the texts to plain text: tags, line breaks, entities.")
    ] = False,
    drop_near_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-near-duplicates",
            help="Drop a record that nearly duplicates an earlier one, such as dialogs made from one template.",
        ),
    ] = False,
) -> None:
    """Convert a data file to the native format. Faults are repaired and counted where possible; other records are
    dropped and listed.
    """
    from llamachat.chat_format.llama2 import SPECIAL_TAGS
    from llamachat.data.convert.command import convert_path

    report = convert_path(
        path,
        out,
        kind=kind,
        format=data_format,
        columns=named_columns(columns),
        forbidden=SPECIAL_TAGS,
        overwrite=overwrite,
        strict=strict,
        plain_text=plain_text,
        drop_near_duplicates=drop_near_duplicates,
    )
    print(f"{report.dropped()}{report.text()}")
