"""Plots read what training and evaluation write, and overlay runs."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from dinov2cli.cli.main import main
from dinov2cli.console import MetricLogger
from dinov2cli.errors import DataError
from dinov2cli.eval.reports import Evaluation, Row, add_result
from dinov2cli.visualize.run_plot import moving_mean, plot_runs, read_run

pytest.importorskip("matplotlib")


def make_run(folder: Path, offset: float = 0.0) -> Path:
    """A run folder as training, online k-NN and `dino2 eval knn` leave it."""
    log = MetricLogger(folder / "training_metrics.json")
    for iteration in range(0, 100, 10):
        loss = float("nan") if iteration == 50 else 10 + offset - iteration / 20
        monitors = {"feature_std": 0.9, "iter_time": 0.1}
        log.write({"iteration": iteration, "total_loss": loss, "lr": 1e-3 * iteration, **monitors})
    log.close()
    with (folder / "training_metrics.json").open("a") as file:
        file.write('{"iteration": 100, "total_lo')  # killed while writing
    knn = MetricLogger(folder / "knn_metrics.json")
    knn.write({"iteration": 50, "knn_top1": 60.0})
    knn.close()
    row = Row("10 neighbours", 71.5, 90.0, 100, (60.0, 80.0))
    add_result(folder / "eval", Evaluation("knn", "eval/training_99", 99, "0", "a", "b", {}, (row,)))
    return folder


def test_curves_of_a_run(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "baseline"))
    assert run.name == "baseline"
    assert set(run.curves) == {
        ("Losses", "total_loss"),
        ("Schedules", "lr"),
        ("Monitors", "feature_std"),
        ("Speed", "iter_time"),
        ("Scores", "k-NN top-1 % (while training)"),
        ("Scores", "knn 10 neighbours top-1 %"),
    }
    iterations, losses = run.curves["Losses", "total_loss"]
    np.testing.assert_array_equal(iterations, np.arange(0, 100, 10))
    assert np.isnan(losses[5]) and losses[9] == 5.5
    assert run.curves["Scores", "knn 10 neighbours top-1 %"][1].tolist() == [71.5]


def test_png_overlays_runs(tmp_path: Path) -> None:
    one, two = read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", offset=3))
    plot_runs([one], tmp_path / "one.png")
    plot_runs([one, two], tmp_path / "two.png", smooth=3)
    single, both = cv2.imread(str(tmp_path / "one.png")), cv2.imread(str(tmp_path / "two.png"))

    def orange(image: np.ndarray) -> int:
        blue, green, red = (image[..., channel].astype(int) for channel in range(3))
        return int(((red > 200) & (green > 90) & (green < 170) & (blue < 60)).sum())

    assert orange(single) == 0 < orange(both)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "one.png", "two.png"]


def test_html_is_self_contained_and_shows_last_values(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name / "run", offset)) for name, offset in (("x", 0.0), ("y", 3.0))]
    plot_runs(runs, tmp_path / "plot.html")
    page = (tmp_path / "plot.html").read_text()
    loaded = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            for name, value in attributes:
                if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                    loaded.append((tag, value))

    Loads().feed(page)
    assert not loaded
    assert page.count("<svg") == 5
    rows = re.findall(r"<tr><td>total_loss</td><td>([^<]*)</td><td>([^<]*)</td>", page)
    assert rows == [("5.5", "8.5")]
    assert "run (2)" in page  # runs of the same folder name are told apart


def test_moving_mean_leaves_out_what_is_not_finite() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    np.testing.assert_allclose(moving_mean(values, 2), [1, 2, 3, 5, 6])
    np.testing.assert_allclose(moving_mean(np.array([np.nan, 4.0]), 2), [np.nan, 4])


def test_command_and_its_mistakes(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for arguments, code, message in (
        ([run], 0, "plot.png"),
        ([run, "--output", tmp_path / "plot.pdf"], 2, "unknown output type '.pdf'"),
        ([tmp_path / "empty"], 2, "not a run folder"),
        ([run, "--output", run / "training_metrics.json" / "plot.png"], 2, "cannot be written"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["plot", *map(str, arguments)])
        assert int(stop.value.code or 0) == code
        captured = capsys.readouterr()
        assert message in (captured.err if code else captured.out)
    assert (run / "plot.png").exists()


def test_damaged_results_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "eval" / "results.json").write_text(json.dumps({"evaluations": [{"task": "knn"}]}))
    with pytest.raises(DataError, match=r"results\.json: cannot be read"):
        read_run(run)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None  # what an absent package looks like to import\n"
        "from dinov2cli.cli.main import main\n"
        f"main(['plot', {str(run)!r}])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'dinov2cli[plots]'" in result.stderr


def test_a_collapse_is_in_the_plot(tmp_path: Path) -> None:
    well, ill = make_run(tmp_path / "well"), make_run(tmp_path / "ill")
    log = MetricLogger(ill / "verdicts.json")
    log.write({"iteration": 90, "verdict": "all images get nearly the same feature"})
    log.close()

    def red(run: Path) -> int:
        plot_runs([read_run(run)], tmp_path / "plot.png")
        blue, green, red = (cv2.imread(str(tmp_path / "plot.png"))[..., channel].astype(int) for channel in range(3))
        return int(((red > 200) & (green < 90) & (blue < 90)).sum())

    assert red(ill) > 2 * red(well) > 0  # both have the threshold
    plot_runs([read_run(ill)], tmp_path / "plot.html")
    assert "ill collapsed since iteration 90, at 1 look" in (tmp_path / "plot.html").read_text()
