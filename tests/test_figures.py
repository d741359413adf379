"""Figures from a made-up run: what they show, and that they are the same each time."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_run as run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from m2d import cli
from m2d.report import plot_experts as experts
from m2d.report import plot_grid as grid
from m2d.report.figures import FIGURES, read_grams, read_repairs, read_statistics
from m2d.report.plot_style import new_figure, plain_log
from m2d.report.tables import make_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    """The options that name every file of the made-up run."""
    files = {"grid": run.write_grid(folder), **run.write_students(folder)}
    statistics, gram = run.write_statistics(folder)
    files |= {"statistics": [statistics], "gram": [gram]}
    files["metrics"] = sorted(folder.rglob("metrics.jsonl"))
    return [word for name, paths in files.items() for word in (f"--{name}", *map(str, paths))]


def test_every_figure_is_written_and_is_the_same_each_time(
    tmp_path: Path, arguments: list[str]
) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert cli.main(["figures", str(out), *arguments]) == 0
    names = sorted(file.name for file in outs[0].iterdir())
    assert names == sorted(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    for name in FIGURES:
        with Image.open(outs[0] / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 250
        assert (pixels < 250).mean() > 0.02  # something is drawn
        svg = (outs[0] / f"{name}.svg").read_text(encoding="utf-8")
        assert svg.rstrip().endswith("</svg>")


def test_without_results_every_figure_says_so(tmp_path: Path) -> None:
    assert cli.main(["figures", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.svg"))) == len(FIGURES)


def test_heat_map_shows_every_configuration_where_it_belongs(folder: Path) -> None:
    table = make_tables(run.write_grid(folder))["grid"]
    figure = grid.heat_map(table)
    left, right = figure.axes[:2]
    shown = left.images[0].get_array()
    assert shown is not None
    assert shown.shape == (7 * 5, 5)
    # Rows: scoring, then grouping. PP is the second scoring, RC the third grouping.
    assert shown[1 * 5 + 2, 3] == run.perplexity_of(
        "preselect_prob", "router_cluster", "uniform", 24
    )
    assert len(left.patches) == 1  # the best cell is framed, in its own panel only
    assert len(right.patches) == 0
    assert left.patches[0].get_xy() == (-0.5, 6 * 5 - 0.5)


def test_usage_counts_effective_experts(tmp_path: Path) -> None:
    rows = [
        {"layer": layer, "expert": expert, "n_tokens": 100, "n_selected": selected}
        for layer, counts in ((1, [50, 50, 50, 50]), (3, [100, 100, 0, 0]))
        for expert, selected in enumerate(counts)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "statistics.parquet")
    figure = experts.usage(read_statistics(tmp_path / "statistics.parquet"))
    widths = [bar.get_width() for bar in figure.axes[1].patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx([4.0, 2.0])


def test_cosines_by_hand() -> None:
    outputs = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    expected = np.array(
        [[1, 0, 0.5**0.5, 0], [0, 1, 0.5**0.5, 0], [0.5**0.5, 0.5**0.5, 1, 0], [0] * 4]
    )
    assert experts.cosines(outputs @ outputs.T) == pytest.approx(expected)


def test_similarity_of_many_layers_shows_eight(folder: Path) -> None:
    _, gram = run.write_statistics(folder)
    one = read_grams(gram)[0]
    figure = experts.similarity(dict.fromkeys(range(48), one))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    shown = [title for title in titles if title.startswith("Layer")]
    assert len(shown) == 8
    assert shown[0] == "Layer 0"
    assert shown[-1] == "Layer 47"


@pytest.mark.parametrize("limits", [(18.0, 90.0), (10.1, 10.4), (1.0, 5e4), (0.03, 0.2)])
def test_log_axes_have_a_few_plain_ticks(limits: tuple[float, float]) -> None:
    _, (axes,) = new_figure()
    axes.set_ylim(*limits)
    plain_log(axes, "y")
    axes.set_ylim(*limits)
    ticks = [t for t in axes.get_yticks() if limits[0] <= t <= limits[1]]
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize("limits", [(90.0, 215.0), (8.0, 75.0), (96.0, 1300.0)])
def test_tick_labels_do_not_overlap(limits: tuple[float, float]) -> None:
    figure, (axes, _) = new_figure(1, 2)
    axes.set_xlim(*limits)
    plain_log(axes, "x")
    axes.set_xlim(*limits)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    labels = [tick.label1 for tick in axes.xaxis.get_major_ticks()]
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    for left, right in itertools.pairwise(boxes):
        assert left.x1 < right.x0


def test_unreadable_inputs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "gram.safetensors"
    bad.write_bytes(b"no")
    assert cli.main(["figures", str(tmp_path / "out"), "--gram", str(bad)]) == 2
    assert "gram.safetensors: not Gram statistics" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_that_meet_go_to_the_next_line() -> None:
    """Above, below where it meets that, a second line above where it meets both."""
    assert grid.label_levels([0, 4, 8, 30], [10, 10, 10, 10]) == [0, 1, 2, 0]
    assert grid.label_levels([0, 10, 16, 20], [10, 10, 10, 10]) == [0, 0, 1, 0]


def test_repairs_stand_by_student_those_alike_together(tmp_path: Path) -> None:
    layers = [{"layer": i, "choice": "layer", "r2_before": 0.2, "r2_after": 0.5} for i in range(3)]
    aligned = [{"layer": i, "before": 0.3, "after": 0.1 * i} for i in range(3)]
    files = []
    for student, variant, more in (
        ("a", "merged", {}), ("b", "merged", {}),
        ("b", "align", {"align": {"layers": aligned}}),
        ("b", "short", {"align": {"layers": aligned}}),
    ):  # fmt: skip
        file = tmp_path / "t" / "students" / student / variant / "m2d.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"fold": {"layers": layers}, **more}), encoding="utf-8")
        files.append(file)
    folds, alignments = read_repairs(files)
    assert list(folds) == ["a, b"]
    assert folds["a, b"] == tuple((i, 0.2, 0.5) for i in range(3))
    assert alignments == {"b": tuple((i, 0.3, pytest.approx(0.1 * i)) for i in range(3))}
