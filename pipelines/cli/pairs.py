"""The command `pairs`: two answers a prompt, for people to compare."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from llamachat.errors import UsageError
from pipelines.cli.exit_status import reported
from pipelines.cli.tools import MaxNewTokens, Seed, TopK, TopP

log = logging.getLogger(__name__)


@reported
def pairs(
    policies: Annotated[
        list[Path],
        typer.Option("--policy", help="Artifact that answers; again for each further one.", metavar="ARTIFACT"),
    ],
    prompts: Annotated[Path, typer.Option("--in", help="Prompts, dialogs or preferences.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", help="The pairs, for people to rate.", metavar="FILE")],
    temperatures: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="One or several: 0.7 1.0. Without it 1.0.", metavar="T..."),
    ] = None,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option("--limit", help="The first so many prompts alone.", min=1)] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", help="Where to write which policy gave which answer, apart from the pairs.", metavar="FILE"
        ),
    ] = None,
) -> None:
    """Two answers to each prompt, from different policies or temperatures, for people to rate (3.2.1)."""
    from llamachat.runs.artifacts import read_artifact

    artifacts = [read_artifact(path, "policy", reader="pairs") for path in policies]
    places = [artifact.path.resolve() for artifact in artifacts]
    if len(set(places)) < len(places):
        raise UsageError(
            f"--policy: {' '.join(map(str, policies))} name one policy twice. Two answers come from two different ones. Name "
            "each once; one alone answers at two temperatures, or in two draws."
        )
    from serving.pairs import Request, counted, pair_file, variant_of

    request = Request(
        temperatures=tuple(dict.fromkeys(temperatures or [1.0])),
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        seed=seed,
        limit=limit,
        key=key,
    )
    variants = [variant_of(artifact, str(path)) for artifact, path in zip(artifacts, policies, strict=True)]
    done = pair_file(variants, prompts, out, request)
    log.info("%s: %d pairs for %d prompts", out, done.pairs, done.prompts)
    if done.shortened:
        log.info("%d prompts: a policy did not see their oldest turns, which did not fit", done.shortened)
    if done.redrawn:
        log.info("answers drawn again: %s", counted(done.redrawn))
    if done.left_out:
        log.warning("prompts left out: %s", counted(done.left_out))
