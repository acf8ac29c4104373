"""The options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. (default: a GPU if there is one)")]
Revision = Annotated[str | None, typer.Option(help="Revision on the Hub: a commit, branch or tag.")]
Model = Annotated[str, typer.Argument(help="A directory, a Hub id (org/name), or an alias: quantkit list models.")]
Output = Annotated[Path, typer.Argument(help="A directory that `quantkit quantize` wrote.")]
Runtime = Annotated[
    str,
    typer.Option(help="dense unpacks the weights, as transformers does; packed computes with them packed."),
]
AnyRuntime = Annotated[
    str | None,
    typer.Option(help="dense unpacks the weights, packed does not. (default: dense; packed with --delta)"),
]
Delta = Annotated[
    Path | None, typer.Option(help="What `quantkit personalize` learned, for the model it was made for; runs packed.")
]
Sparsity = Annotated[
    str | None,
    typer.Option(
        help="How much is pruned: a share such as 0.5, or N:M such as 2:4: N of every M inputs stay. (default: 0.5)"
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        help="What share each linear loses: uniform, magnitude (one threshold for the whole model), loss or mfac"
        " (what costs the blocks' outputs least). (default: uniform)"
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Begin anew instead of going on with an interrupted run of the same OUTPUT.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Most host memory to take, e.g. 8GiB; activations that do not fit go to the disk, the result is the"
        " same. (default: a share of what is free)"
    ),
]
SourceModel = Annotated[
    str | None, typer.Argument(help="A directory, a Hub id (org/name), or an alias: quantkit list models.")
]
Target = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory to write; it appears whole or not at all.")
]
Seqlen = Annotated[int | None, typer.Option(help="Tokens in a sequence. (default: 2048, or the model's context)")]
AllowShort = Annotated[
    bool | None, typer.Option("--allow-short", help="Go on when the text has fewer sequences than asked for.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random. (default: 0)")]
RecipeFile = Annotated[Path | None, typer.Option(help="TOML recipe, as saved beside a model; flags change it.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUTPUT; the old one is kept until the new one is whole.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan (sites, sizes, memory, disk, time); compute nothing.")
]
