"""`dino2 results`: the evaluations of a run."""

from pathlib import Path
from typing import Annotated

import typer


def results(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a results.json.", show_default=False)],
    task: Annotated[str | None, typer.Option("--task", help="Only knn, logreg or linear.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Show all evaluations of a run's checkpoints, with 95 % confidence intervals.

    The intervals say how sure the accuracy is for the number of images it was measured on.

    Example:

        dino2 results runs/demo
    """
    from dinov2cli.console import out, print_json
    from dinov2cli.eval.reports import read_results, results_table

    evaluations = [each for each in read_results(run) if task in (None, each.task)]
    if as_json:
        print_json({"evaluations": [each.as_dict() for each in evaluations]})
    else:
        out.print(results_table(evaluations, title=str(run)))
