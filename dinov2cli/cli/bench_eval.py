"""`dino2 bench knn|logreg|linear`: the evaluations beside the plain way to compute the same."""

from typing import Annotated, Any

import typer

Dim = Annotated[int, typer.Option("--dim", min=1, help="Dimensions of a feature.")]
Classes = Annotated[int, typer.Option("--classes", min=2, help="Number of classes.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def knn_command(
    queries: Annotated[int, typer.Option("--queries", min=1, help="Features to classify.")] = 10_000,
    keys: Annotated[int, typer.Option("--keys", min=1, help="Features to search.")] = 100_000,
    dim: Dim = 384,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours.")] = 200,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure the exact k-NN search beside the bare matrix product.

    Example:

        dino2 bench knn --queries 2000
    """
    from dinov2cli.eval.benchmarks import bench_knn

    facts = bench_knn(queries, keys, dim, min(k, keys), device)
    _show(
        facts, "search takes {ratio:.2f} times the bare product ({search_s:.2f} s and {bare_product_s:.2f} s)", as_json
    )


def logreg_command(
    images: Annotated[int, typer.Option("--images", min=100, help="Features; a tenth of them for testing.")] = 60_000,
    dim: Dim = 384,
    classes: Classes = 10,
    every: Annotated[int, typer.Option("--every", min=1, help="Fit every n-th C with scikit-learn.")] = 9,
    limit: Annotated[
        float, typer.Option("--limit", min=0, help="Seconds after which scikit-learn begins no further fit.")
    ] = 300,
    as_json: AsJson = False,
) -> None:
    """Measure the sweep over 45 values of C beside scikit-learn's fits one by one.

    Example:

        dino2 bench logreg --images 6000
    """
    from dinov2cli.eval.benchmarks import bench_logreg

    facts = bench_logreg(images, dim, classes, every, limit)
    text = (
        "45 values of C: {sweep_s:.1f} s, scikit-learn {scikit_learn_s:.1f} s (from {scikit_learn_fits} fits), "
        "{ratio:.1f} times as long and {ratio_of_work:.1f} times the work; "
        "accuracies differ by at most {largest_accuracy_difference:.2f} points, and the objective is at most "
        "{largest_objective_excess:.0e} of it higher"
    )
    _show(facts, text, as_json)


def linear_command(
    dim: Dim = 384,
    classes: Classes = 10,
    batch: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a step.")] = 128,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to time.")] = 20,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure a training step of 52 linear heads beside 52 separate ones.

    Example:

        dino2 bench linear --classes 1000 --steps 3
    """
    from dinov2cli.eval.benchmarks import bench_linear

    facts = bench_linear(dim, classes, batch, steps, device)
    text = "a step of 52 heads: {together_s:.4f} s, separately {separate_s:.4f} s, {ratio:.1f} times as long"
    _show(facts, text, as_json)


def _show(facts: dict[str, Any], text: str, as_json: bool) -> None:
    from dinov2cli.console import out, print_json

    if as_json:
        print_json(facts)
    else:
        out.print(text.format(**facts))
