"""The workflow from other places: another folder, another workflow, `m2d init` for a teacher."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_teacher
from workflow_project import CONFIG, REPOSITORY, environment, jobs_of, write_config

from m2d.cli import main
from m2d.methods import table
from m2d.pipeline import place, teachers
from m2d.pipeline.choices import described
from m2d.pipeline.expand import expanded
from m2d.pipeline.settings import check_config

pytestmark = pytest.mark.timeout(600)


def dry_run(folder: Path, *arguments: object) -> str:
    """Snakemake's dry run in a folder that has no workflow of its own."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--dry-run"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        env=environment(REPOSITORY),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path, tiny_teacher: Path, tiny_text: Path) -> Path:
    """A folder with a config of its own and no workflow."""
    folder = tmp_path / "my study (2)"
    folder.mkdir()
    config = {**CONFIG, "datasets": {"text": {"files": [str(tiny_text)]}}}
    tiny = {**CONFIG["teachers"]["tiny"], "model": str(tiny_teacher)}
    write_config(folder, {**config, "teachers": {"tiny": tiny}})
    return folder


def test_another_folder(folder: Path, tmp_path: Path) -> None:
    told = dry_run(folder, "--snakefile", place.snakefile(), "all_wide")
    jobs = jobs_of(told)
    assert "distill_student recipe=short student=sf" in jobs
    assert jobs_of(dry_run(tmp_path, "-s", place.snakefile(), "-d", folder, "all_wide")) == jobs


def test_a_module_of_another_workflow(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    write_config(folder, {"mine": 1, "dense": config})
    (folder / "Snakefile").write_text(
        'configfile: "config.yaml"\n'
        f"module m2d:\n    snakefile: {str(place.snakefile())!r}\n    config: config['dense']\n"
        "use rule * from m2d as m2d_*\n"
        'rule mine:\n    default_target: True\n    input: "results/tables/all_tiny"\n'
    )
    told = dry_run(folder)
    assert "m2d_distill_student" in told
    assert "m2d_rank_experts" in told


def test_conda_environments_name_this_m2d(folder: Path) -> None:
    dry_run(folder, "-s", place.snakefile(), "all_tiny")
    made = yaml.safe_load((folder / ".snakemake" / "m2d.yaml").read_text())
    assert made["dependencies"][-1]["pip"] == [f"-e {REPOSITORY}[workflow,distill,eval,demo]"]


def test_what_a_students_name_says() -> None:
    for scoring in table("scoring"):
        name = table("scoring").term(scoring).lower()
        uniform = {"scoring": scoring, "grouping": "round_robin", "scaling": "uniform", "keep": 8}
        assert described(f"{name}-k8") == described(f"{scoring}-k8") == uniform
        for grouping in table("grouping"):
            for scaling in table("scaling"):
                full = f"{name}-{table('grouping').term(grouping).lower()}-{scaling}-k12"
                assert described(full) == {
                    "scoring": scoring, "grouping": grouping, "scaling": scaling, "keep": 12
                }  # fmt: skip
    for name in (
        "do-acp",
        "k8",
        "wc-k8",
        "sf-wc-rc-k8",
        "sf-k0",
        "sf-k08",
        "best-sf-wc",
        "sf-x-k8",
    ):
        assert described(name) is None, name


def test_braces_stand_for_several() -> None:
    teacher = {"experts": 64, "top_k": 6}
    assert expanded("plain", teacher) == ["plain"]
    assert expanded("{sf, do-acp}-k{top_k}", teacher) == ["sf-k6", "do-acp-k6"]
    assert expanded("sf-{wc,oc}-k{2*top_k}", teacher) == ["sf-wc-k12", "sf-oc-k12"]
    assert expanded("cp-k{experts}", teacher) == ["cp-k64"]


def test_a_described_student_is_made_without_any_entry(folder: Path) -> None:
    file = "results/tiny/students/cp-oc-proportional-k4/merged"
    told = dry_run(folder, "-s", place.snakefile(), "--printshellcmds", "--", file)
    assert "merge_student student=cp-oc-proportional-k4" in jobs_of(told)
    told = " ".join(told.replace("\\\n", " ").split())
    assert "--grouping output_cluster --scaling proportional --keep 4" in told


def test_a_teacher_is_read_once(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = {"pipelines": {}, "teachers": {"t": {"model": str(tiny_teacher)}}}
    teacher = check_config(config)["teachers"]["t"]
    assert (teacher["experts"], teacher["top_k"], teacher["keeps"]) == (8, 2, [2, 4, 8])
    assert (teacher["dtype"], teacher["batch"]) == ("auto", 4)
    assert teacher["tokens"]["calibration"]["sequences"] == 512
    monkeypatch.setattr(teachers, "inspected", lambda model: pytest.fail("read again"))
    assert check_config(config)["teachers"]["t"] == teacher
    stated = {"model": str(tiny_teacher), "keeps": [3], "batch": 2, "dtype": "bfloat16"}
    assert check_config({**config, "teachers": {"t": stated}})["teachers"]["t"] == {
        **teacher,
        **stated,
    }
    # Another config.json is another teacher.
    other = make_teacher(tmp_path / "other", num_experts_per_tok=4)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = check_config({**config, "teachers": {"t": {"model": str(other)}}})["teachers"]["t"]
    assert found["top_k"] == 4


def test_init_writes_a_config_that_runs(
    tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher(tmp_path / "My MoE (v2)")
    words = ["init", str(teacher), "--text", str(tiny_text), "--test", str(tiny_text)]
    assert main([*words, "--length", "32", "--tokens", "20K"]) == 0
    text = capsys.readouterr().out
    assert 10 <= len(text.splitlines()) <= 30
    (tmp_path / "my.yaml").write_text(text)
    told = dry_run(tmp_path, "-s", place.snakefile(), "--configfile", "my.yaml", "--", "all")
    assert "distill_student recipe=distilled student=do-acp-k2 teacher=my-moe-v2" in jobs_of(told)


def test_init_compares_with_a_dense_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["init", "Qwen/Qwen3-30B-A3B", "--dense-teacher", "Qwen/Qwen3-32B"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert 10 <= len(text.splitlines()) <= 30
    config = check_config(yaml.safe_load(text))
    # The published student of structured pruning.
    assert config["students"]["pruned"] == {
        "baseline": "d2d", "layers": 48, "hidden_size": 2048, "heads": 32, "kv_heads": 8,
        "intermediate_size": 6144,
    }  # fmt: skip
    (pipeline,) = config["pipelines"].values()
    assert [entry["student"] for entry in pipeline["distill"]] == ["do-acp-k8", "pruned"]
    recipe = config["recipes"]["distilled"]
    assert 3e8 * 0.99 < recipe["steps"] * recipe["batch"] * 2048 <= 3e8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["Qwen/Qwen3-32B"], "Qwen/Qwen3-32B: has no experts"),
        (["Qwen/Qwen3-30B-A3B", "--dense-teacher", "openai/gpt-oss-20b"], "has experts; --dense"),
        (["Qwen/Qwen3-30B-A3B", "--text", "README.md"], "--text and --test go together"),
        (["Qwen/Qwen3-30B-A3B", "--tokens", "lots"], "'lots' is no number of tokens"),
        (["no/such", "--tokens", "1M"], "no/such: nothing is known of it"),
    ],
)
def test_init_refuses(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["init", *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert says in capsys.readouterr().err
