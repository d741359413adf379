"""Tables from a made-up run whose right answers are known."""

import json
import math
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import synthetic_run as run

from m2d import cli
from m2d.errors import UserError
from m2d.report import comparisons
from m2d.report.results import (
    Place,
    as_rows,
    place_of,
    read_benchmarks,
    read_published,
    seconds_by_model,
)
from m2d.report.table_html import shown, table_html
from m2d.report.tables import TABLES, make_tables, write_table

# Those with published students; a run of several teachers has a table for each.
FAMILIES = ("family_deepseek-v2-lite", "family_gpt-oss-20b", "family_qwen3-30b-a3b")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("results")
    files = run.write_students(folder)
    return make_tables(
        run.write_grid(folder),
        files["perplexity"],
        files["evaluation"],
        files["provenance"],
        run.write_benchmarks(folder),
    )


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("r/t/grid/reap.parquet", Place("t", "", "", scoring="reap")),
        ("r/t/perplexity.json", Place("t", "", "teacher")),
        ("r/t/teacher.eval/mmlu.json", Place("t", "", "teacher", task="mmlu")),
        ("r/t/students/s-k4/merged.perplexity.json", Place("t", "s-k4", "merged")),
        ("r/t/students/s/fast.eval/mmlu.json", Place("t", "s", "fast", task="mmlu")),
        ("r/t/students/s/fast/m2d.json", Place("t", "s", "fast")),
    ],
)
def test_the_path_says_what_a_file_is_about(path: str, place: Place) -> None:
    assert place_of(path) == place


@pytest.mark.parametrize("path", ["x.json", "r/t/students/merged.eval/a/b.json", "grid.parquet"])
def test_a_file_out_of_place_is_named(path: str) -> None:
    with pytest.raises(UserError, match=path):
        place_of(path)


def test_the_grid_has_every_row_and_says_which_are_the_same(tables: dict) -> None:
    grid = tables["grid"]
    assert len(grid) == 350
    # At K = top-k all five groupings give one student: 7 x 2 x 4 repeat an earlier row.
    assert (grid["same_as"] != "").sum() == 56
    repeated = grid[grid["same_as"] != ""].iloc[0]
    assert repeated["same_as"] == "selection_freq/round_robin/uniform/4"
    assert grid["relative"].min() == 1.0
    assert grid["stderr"].tolist() == pytest.approx((0.02 * grid["perplexity"]).tolist())
    cells = tables["results"][tables["results"]["variant"] == "grid"]
    assert cells["stderr"].notna().all()


def test_best_of_each_choice(tables: dict) -> None:
    best = tables["grid_best"].set_index(["axis", "value"])
    assert len(best) == 7 + 5 + 2 + 5
    row = best.loc[("scoring", "gld_reap")]
    assert row["term"] == "DO-ACP"
    assert row["best_perplexity"] == pytest.approx(math.exp(2.9))
    assert row["best_configuration"] == "round_robin/uniform/4"
    assert best.loc[("keep", "32"), "best_perplexity"] == pytest.approx(math.exp(2.9 + 0.6))


def test_axis_effects_are_those_of_a_hand_computed_analysis(tables: dict) -> None:
    effects = tables["axes"].set_index("axis")
    grid = tables["grid"]
    logs = grid["perplexity"].map(math.log)
    mean = sum(logs) / 350
    total = sum((value - mean) ** 2 for value in logs)
    between = 0.0
    for scaling in ("uniform", "proportional"):
        own = [v for v, s in zip(logs, grid["scaling"], strict=True) if s == scaling]
        between += len(own) * (sum(own) / len(own) - mean) ** 2
    assert effects.loc["scaling", "share_of_variance"] == pytest.approx(between / total)
    assert effects.loc["scaling", "spread"] == pytest.approx(math.exp(0.08))
    assert effects.loc["scoring", "spread"] == pytest.approx(math.exp(0.12 * 6))
    assert effects.loc["scoring", "best_value"] == "gld_reap"
    assert effects["share_of_variance"].sum() < 1


def test_students_with_scores_and_standard_errors(tables: dict) -> None:
    students = tables["students"].set_index(["student", "variant"])
    assert len(students) == 1 + 3 * 3 + 3
    row = students.loc[("gld_reap-k4", "expanded")]
    assert (row["perplexity"], row["perplexity ±"]) == (15.0, 0.25)
    assert row["parameters"] == 2_000_000
    assert row["tokens"] == 500_000
    # The teacher's size is known from its evaluation.
    (teacher,) = students[students.index.get_level_values("variant") == "teacher"].to_dict(
        "records"
    )
    assert (teacher["parameters"], teacher["bytes"]) == (4_961_000, 9_922_000)
    assert (teacher["perplexity"], teacher["demo_continuation"]) == (9.5, 80.0)
    assert tables["students"].loc[0, "variant"] == "teacher"
    assert tables["students"]["student"].isna().tolist() == [True] + [False] * 12
    # acc_norm where the task has it, else acc
    assert row["demo_continuation"] == pytest.approx(68)
    assert row["demo_package"] == pytest.approx(73)
    assert row["average"] == pytest.approx((68 + 73) / 2)
    errors = [100 * (p * (1 - p) / 240) ** 0.5 for p in (0.68, 0.73)]
    assert row["average ±"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert students.loc[("gld_reap-k4", "merged"), "demo_package"] == pytest.approx(45)
    assert row["average published"] is not None
    assert math.isnan(row["average published"])


def test_a_refitted_student_is_not_a_distilled_one(tables: dict) -> None:
    students = tables["students"].set_index("student").loc["solved"]
    assert students["variant"].tolist() == ["merged", "refit", "short"]
    assert students["start"].fillna("").tolist() == ["", "", "refit"]
    assert students["made_s"].tolist() == [3.0, 2.0, 5.0]
    assert students["measured_s"].fillna(0).tolist() == [0, 0, 2.5]
    grid = tables["distilled_grid"]
    assert set(grid["variant"]) == {"short", "expanded"}
    starts = grid[grid["variant"] == "short"].set_index("student")["start"]
    assert starts.pop("solved") == "refit"
    assert set(starts) == {"merged"}


def test_long_table_holds_everything_in_one_format(tables: dict) -> None:
    long = tables["results"]
    assert (long["variant"] == "grid").sum() == 350
    assert (long["source"] == "published").sum() == 28 * 6
    ours = long[(long["source"] == "ours") & (long["variant"] != "grid")]
    # 13 variants: a perplexity, acc twice, acc_norm once
    assert len(ours) == 13 * 4
    assert ours.loc[ours["measure"] == "acc_norm", "stderr"].notna().all()


def test_distilled_grid_and_expanded_routing(tables: dict) -> None:
    grid = tables["distilled_grid"].set_index(["variant", "student"])
    assert len(grid) == 3 * 2 + 1
    assert grid.loc[("short", "gld_reap-k16"), "perplexity"] == 16.5
    routing = tables["expanded_routing"]
    assert routing["teacher_top_k"].isna().tolist() == [True, False] * 3
    assert routing["student"].tolist() == sorted([*set(routing["student"])] * 2)
    gains = routing["average"].diff()[1::2]
    assert gains.tolist() == pytest.approx([4.0] * 3)
    assert tables["teacher_ab"].empty


def make_models(*changes: dict) -> pd.DataFrame:
    """Rows of models: a distilled student with one score, once for each of the changes."""
    base = {"teacher": "qwen3-30b-a3b", "student": "best", "scoring": "gld_reap", "keep": 8}
    base |= {"grouping": "round_robin", "scaling": "uniform", "variant": "full", "source": "ours"}
    base |= {"tokens": 5086 * 384 * 2048, "start": "merged", "task": "mmlu", "measure": "acc"}
    base |= {"parameters": 3_340_449_792}
    rows = [{**base, "value": 0.45, "stderr": 0.004, **change} for change in changes]
    no_times = seconds_by_model(read_benchmarks(None))
    return comparisons.model_rows(as_rows(rows + read_published()), no_times)


def test_what_was_not_scored_has_no_average() -> None:
    """Of a run without evaluations: not 0."""
    row = make_models({"task": "test", "measure": "perplexity", "value": 20.0}).iloc[0]
    assert (row["source"], row["perplexity"]) == ("ours", 20.0)
    assert pd.isna(row["average"])
    assert pd.isna(row["average ±"])
    scored = make_models({}).iloc[0]
    assert scored["average"] == pytest.approx(45.0)


def test_seconds_of_models_by_the_names_of_jobs(tmp_path: Path) -> None:
    jobs = {
        "merge_student/t/a": 1,
        "merge_neurons/t/b": 2,
        "measure_neurons/t/greedy": 4,
        "refit_student/t/b": 8,
        "distill_student/t/b/short": 16,
        "measure_student/t/b/refit": 32,
        "evaluate_student/t/b/refit/arc": 64,
        "measure_teacher/t": 128,
    }
    for job, seconds in jobs.items():
        file = tmp_path / f"{job}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"s\tmax_rss\n{seconds}\t5\n")
    times = seconds_by_model(read_benchmarks(tmp_path)).fillna(0)
    assert {key: tuple(row) for key, row in times.iterrows()} == {
        ("t", "", "teacher"): (0, 128),
        ("t", "a", "merged"): (1, 0),
        ("t", "b", "merged"): (2, 0),
        ("t", "b", "refit"): (8, 96),
        ("t", "b", "short"): (16, 0),
    }


def test_published_scores_beside_ours() -> None:
    models = make_models({}, {"student": "other", "keep": 16}, {"task": "winogrande", "value": 0.6})
    table = comparisons.published(models)
    assert len(table) == 28
    row = table[table["source"] == "ours"].iloc[0]
    assert row["student"] == "best"
    assert (row["mmlu"], row["mmlu ±"], row["mmlu published"]) == (45.0, 0.4, 46.1)
    assert (row["winogrande"], row["winogrande published"]) == (60.0, 63.1)
    assert row["average published"] == 58.1
    assert row["average"] == pytest.approx(52.5)
    family = comparisons.families(models)["family_qwen3-30b-a3b"]
    assert set(family["student"]) == {
        "best",
        "other",
        "SF, K=16, weight clustering, uniform",
        "Random FFN + teacher attention",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 300_000_000},
        {"start": "refit"},
        {"baseline": "random_ffn", "scoring": None, "tokens": 3 * 10**9},
        {"parameters": 1_700_000_000},
        {"teacher_top_k": 16},
        {"scaling": "proportional"},
        {"teacher": "qwen3-30b-a3b-base"},
        {"variant": "merged", "tokens": None, "start": None},
    ],
)
def test_published_scores_stand_beside_the_same_model_only(change: dict) -> None:
    table = comparisons.published(make_models(change))
    assert set(table["source"]) == {"published"}
    assert len(table) == 28


def test_a_baseline_of_ours_stands_beside_the_published_one() -> None:
    plan = {"scoring": None, "grouping": None, "scaling": None, "keep": None}
    d2d = {"teacher": "qwen3-32b", "baseline": "d2d", "parameters": 3_441_113_088, **plan}
    models = make_models({**d2d, "student": "d2d"}, {"baseline": "random_ffn", **plan})
    table = comparisons.headline(models).set_index("student")
    assert table.loc["d2d", "mmlu published"] == 26.6
    assert table.loc["best", "mmlu published"] == 27.1
    assert len(table) == 6


def test_headline_shows_ours_before_and_after() -> None:
    before = {"variant": "merged", "tokens": None, "start": None, "value": 0.25}
    teacher = {**before, "variant": "teacher", "student": None, "scoring": None, "keep": None}
    models = make_models({}, before, teacher, {**before, "student": "other"})
    table = comparisons.headline(models)
    ours = table[table["source"] == "ours"]
    assert ours["variant"].tolist() == ["teacher", "merged", "full"]
    assert set(ours["student"].dropna()) == {"best"}
    theirs = table[table["source"] == "published"]
    assert sorted(theirs["variant"]) == ["baseline"] * 2 + ["reference"] * 2 + ["student"]
    assert len(comparisons.headline(make_models(before))) == 6


def test_students_of_two_teachers_stand_together() -> None:
    models = make_models({}, {"teacher": "qwen3-30b-a3b-base"}, {"student": "alone"})
    table = comparisons.teacher_ab(models)
    assert table["teacher"].tolist() == ["qwen3-30b-a3b", "qwen3-30b-a3b-base"]
    assert table.columns.tolist() == comparisons.headline(models).columns.tolist()
    assert len(comparisons.families(models)["family_qwen3-30b-a3b-base"]) == 1


def test_the_published_averages_are_those_of_the_source(tables: dict) -> None:
    table = tables["published"]
    source = pd.read_csv(Path(run.__file__).parents[1] / "m2d/report/published_results.csv")
    keys = ["teacher", "student"]
    shown = table.set_index(keys)["average published"]
    assert shown.sort_index().to_dict() == source.set_index(keys)["average"].to_dict()


def test_timings_per_rule(tables: dict) -> None:
    timings = tables["timings"]
    assert timings["rule"].tolist()[:3] == ["measure_grid", "distill_student", "merge_student"]
    assert timings.loc[0, ["jobs", "seconds", "max_seconds"]].tolist() == [2, 20.0, 12.5]


def test_written_whole_in_four_formats_and_the_same_each_time(tmp_path: Path) -> None:
    grid = [str(file) for file in run.write_grid(tmp_path)]
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert cli.main(["tables", str(out), "--grid", *grid]) == 0
    names = sorted(file.name for file in outs[0].iterdir())
    kinds = ("csv", "html", "md", "parquet")
    assert names == sorted(f"{name}.{kind}" for name in [*TABLES, *FAMILIES] for kind in kinds)
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert len(pd.read_csv(outs[0] / "grid.csv")) == 350
    assert len(pd.read_parquet(outs[0] / "grid.parquet")) == 350
    assert (outs[0] / "grid.md").read_text(encoding="utf-8").count("\n| ") >= 350


def test_tables_without_any_input_are_empty_but_there(tmp_path: Path) -> None:
    assert cli.main(["tables", str(tmp_path / "out")]) == 0
    assert len(pd.read_csv(tmp_path / "out" / "published.csv")) == 28


def test_html_escapes_and_keeps_full_values() -> None:
    page = table_html(pd.DataFrame({"<a>": [1 / 3, None], "b": ["<i>", "x"]}), "T", "C")
    assert "<i>" not in page
    assert "&lt;i&gt;" in page
    assert 'data-v="0.3333333333333333">0.333<' in page
    assert "<td></td>" in page


def test_numbers_are_shown_alike_down_a_column() -> None:
    frame = pd.DataFrame({"a": [3340449792, 2], "b": [57.1, 53.0], "c": [0.12345, None]})
    assert shown(frame).to_dict("list") == {
        "a": ["3,340,449,792", "2"],
        "b": ["57.10", "53.00"],
        "c": ["0.123", ""],
    }


def test_for_reading_empty_columns_are_left_out(tmp_path: Path) -> None:
    frame = pd.DataFrame({"rule": ["a"], "jobs": [None]})
    write_table(frame, "timings", tmp_path)
    assert "| jobs" not in (tmp_path / "timings.md").read_text(encoding="utf-8")
    assert "jobs</button>" not in (tmp_path / "timings.html").read_text(encoding="utf-8")
    assert "jobs" in (tmp_path / "timings.csv").read_text(encoding="utf-8")


def test_bad_inputs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "t" / "grid" / "x.parquet"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"no")
    assert cli.main(["tables", str(tmp_path / "out"), "--grid", str(bad)]) == 2
    assert "x.parquet: not readable as Parquet" in capsys.readouterr().err
    empty = tmp_path / "t" / "teacher.eval" / "mmlu.json"
    run.write_json(empty, {"results": {}})
    assert cli.main(["tables", str(tmp_path / "out"), "--evaluation", str(empty)]) == 2
    assert "holds no result of mmlu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert json.loads(empty.read_text()) == {"results": {}}


def test_perplexities_of_different_tokens_stand_in_no_table(tmp_path: Path) -> None:
    files = run.write_students(tmp_path)["perplexity"]
    for number, file in enumerate(files[:3]):
        content = json.loads(file.read_text()) | {"tokens_sha256": "ab" if number < 2 else "cd"}
        file.write_text(json.dumps(content))
    grids = run.write_grid(tmp_path)
    assert len(make_tables(grids, files[:2])["results"])
    with pytest.raises(UserError, match=f"{files[2].name}: was measured on other tokens than"):
        make_tables(grids, files)
    table = pq.read_table(grids[0]).replace_schema_metadata({"m2d": '{"tokens_sha256": "ef"}'})
    pq.write_table(table, grids[0])
    with pytest.raises(UserError, match=f"was measured on other tokens than .*{grids[0].name}"):
        make_tables(grids, files[:2])
