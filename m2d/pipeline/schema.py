"""The keys of the workflow's config, each with its type, default, bounds and meaning.

What one key alone cannot say (names that must exist, K between top-k and experts) is checked in
m2d/pipeline/settings.py; the keys of a student are in m2d/pipeline/student_settings.py.
`python -m m2d.pipeline.schema` prints the JSON schema, for editors.
"""

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from m2d.distill.settings import DistillSettings
from m2d.evaluate.names import task_name
from m2d.methods import table
from m2d.pipeline.student_settings import Grouping, Scaling, Scoring, StudentSettings, unique
from m2d.settings import ComputeDtype, Count, NotNegative, Number, Positive, Section, Whole

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Text], AfterValidator(unique)]
Argument = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class HardwareSettings(Section):
    """What the cluster's GPUs and nodes are; jobs are sized and estimated by it."""

    flops: Positive = 4e14
    """Operations per second of one GPU at its best, in the teacher's dtype."""
    utilization: Annotated[float, Number, Field(gt=0, le=1)] = 0.4
    """Share of those that jobs reach."""
    gpu_memory_gb: Positive = 80
    """Memory of one GPU."""
    gpus_per_node: Count = 8
    """GPUs of a node."""
    max_nodes: Count = 1
    """Nodes that a distillation may take."""
    disk_gb_per_second: Positive = 1.0
    """Speed of the disk that holds models."""
    hours: Positive = 24.0
    """A distillation's time limit: it takes GPUs until it is done within these hours."""


class DatasetSettings(Section):
    """A text: exactly one of corpus, files, hub and mix."""

    corpus: Literal["train", "calibration", "test"] | None = None
    """A split of the demo corpus, which the workflow makes."""
    files: Annotated[Names, Field(min_length=1)] | None = None
    """Text files (.txt, .md, .jsonl or .parquet with a field `text`)."""
    hub: Text | None = None
    """NAME[@CONFIG][:SPLIT[:COLUMN]], read through `datasets`."""
    mix: Annotated[dict[str, Positive], Field(min_length=2)] | None = None
    """Names of other texts, each with its share of the characters; of `files`, a single one."""

    @model_validator(mode="after")
    def _one(self) -> "DatasetSettings":
        if len(given := self.model_fields_set) != 1:
            allowed = ", ".join(type(self).model_fields)
            raise ValueError(f"has {len(given)} keys; exactly one of {allowed} is allowed")
        return self


class TokenSettings(Section):
    """Token sequences made with a teacher's tokenizer."""

    dataset: Text
    """A name of `datasets`."""
    sequences: Count
    """Number of sequences."""
    length: Count
    """Tokens of a sequence."""
    column: Text | None = None
    """Of the dataset, the column that holds the text or the chats; found if left out."""
    bos: Literal["auto", "document", "sequence", "none"] | None = None
    """Where a beginning-of-sequence token stands; auto, as the tokenizer has it, if left out."""


class DistillationTokenSettings(TokenSettings):
    """Token sequences, and which of their tokens the loss counts."""

    loss_on: Literal["all", "assistant"] | None = None
    """Of chats, all tokens, also if left out, or what the assistant says."""


class TokensSettings(Section):
    """The token sequences of a teacher, by use."""

    calibration: TokenSettings
    """For routing and Gram statistics."""
    test: TokenSettings
    """For perplexity."""
    distillation: DistillationTokenSettings | None = None
    """For distillation, in an order that follows from the seed, a new one every epoch."""


class ResourceSettings(Section):
    """What jobs ask for, where that is not to follow from sizes."""

    gpus: Whole | None = None
    """GPUs, a process on each."""
    mem_mb: Count | None = None
    """Main memory of a node in MB; more with each attempt."""
    runtime: Count | None = None
    """Minutes of one attempt."""


class TeacherSettings(Section):
    """A trained model. Of one without experts, students by structured pruning are made."""

    model: Text
    """Folder or hub id. What is left out below follows from its config.json."""
    tokens: TokensSettings | None = None
    """The token sequences made with this teacher's tokenizer; those of the config if left out."""
    experts: Count | None = None
    """Routed experts of a layer."""
    top_k: Count | None = None
    """Experts that the router selects for a token."""
    keeps: Annotated[list[Count], Field(min_length=1), AfterValidator(unique)] | None = None
    """The values of K, the number of experts kept, in the grid; top-k, twice as many, four times,
    eight times, and all or 16 times if left out."""
    dtype: ComputeDtype = "auto"
    """Numbers that the teacher and its students compute with; auto: the checkpoint's where the
    device is fast in them, else float32."""
    batch: Count | None = None
    """Sequences in one forward pass; 8192 tokens, at most 16 sequences if left out."""
    shares: Count | None = None
    """Jobs that take a share of the calibration sequences each; one by default."""
    sizes: Text | None = None
    """File of `m2d inspect MODEL --json`, by which jobs ask for GPUs, memory and time; made where
    it is left out."""
    resources: ResourceSettings | None = None
    """What every job on this teacher asks for; distillations ask for what their recipe says."""


class GridSettings(Section):
    """What the grid crosses with every scoring method and every K."""

    groupings: Annotated[list[Grouping], AfterValidator(unique)] = Field(
        default=[*table("grouping").paper]
    )
    """Grouping methods; identifiers or the paper's terms."""
    scalings: Annotated[list[Scaling], AfterValidator(unique)] = Field(
        default=[*table("scaling").paper]
    )
    """Scaling methods of the down projections."""


class StoredLogitsSettings(Section):
    """A teacher's logits, stored once for the students of all recipes that have the same.

    A token takes 4 bytes times `size`, 6 where the vocabulary is above 65,536.
    """

    kind: Literal["top", "sampled"]
    """The most probable tokens, or draws (docs/distillation.md)."""
    size: Count
    """How many of them per token."""
    parts: Count = 1
    """Jobs that share the work."""


class RecipeSettings(ResourceSettings, DistillSettings):
    """Distillation settings: the options of `m2d distill`, and what its job asks for."""

    steps: Count
    """Optimizer steps."""
    batch: Count = 384
    """Sequences of a step, on all GPUs."""
    teacher_logits: StoredLogitsSettings | None = None
    """Run the teacher once, and store its logits."""


class EvaluationSettings(Section):
    """What models are scored on; one job per model and task."""

    tasks: Annotated[
        list[Annotated[Text, AfterValidator(task_name)]],
        Field(min_length=1),
        AfterValidator(unique),
    ]
    """Tasks or groups of lm-eval, by its names."""
    shots: Whole
    """Examples in the prompt."""
    limit: Count | None = None
    """Only so many documents of each task."""
    batch_size: Count | None = None
    """Questions at a time; found by trial, which takes time, if left out."""
    tokens: NotNegative = 0
    """About how many a model reads for these tasks, to size and estimate jobs."""
    demo: bool = False
    """The tasks are made from the demo corpus."""
    together: bool = False
    """One job for all tasks, which loads the model once; a task added later repeats them all."""
    datasets: dict[str, str] = Field(default={})
    """Local folders of the tasks' datasets, by their names on the hub, such as allenai/winogrande;
    others come from HF_HOME or the hub."""
    backend: Literal["hf", "vllm"] | None = None
    """What runs the model; vllm must be installed and needs a GPU. hf if left out."""
    model_args: dict[Argument, str | bool | int | float] = Field(default={})
    """Passed to the backend, such as tensor_parallel_size for vllm."""


class DistillationEntry(Section):
    """A student that is distilled, and how."""

    student: Text
    """A name of `students`, or one that describes a student, like sf-wc-k16; braces for several."""
    recipe: Text
    """A name of `recipes`."""


class PipelineSettings(Section):
    """A target of the workflow."""

    teachers: Names = Field(default=[])
    """Teachers; the rest is done for each: d2d students for those that are dense, all others for
    those with experts."""
    each: dict[Name, Text | Names] | None = None
    """In place of teachers, for several pipelines of one shape: target -> its teacher or teachers.
    The key of this pipeline is then no target."""
    scorings: Annotated[list[Scoring], AfterValidator(unique)] = Field(default=[])
    """Scoring methods whose grid is computed."""
    students: Names = Field(default=[])
    """Students that are written: names of `students`, or such as describe one, like sf-wc-k16.
    Braces stand for several: "{sf,cp}-k{top_k}"."""
    distill: list[DistillationEntry] = Field(default=[])
    """Students that are distilled, and how."""
    best: Text | None = None
    """A recipe. For every scoring of this pipeline and every grouping of the grid, the student with
    the lowest perplexity in the grid is written and distilled by it."""
    evaluations: Names = Field(default=[])
    """Evaluations of the teacher, every student and every distilled student."""

    @model_validator(mode="after")
    def _teachers(self) -> "PipelineSettings":
        if len(self.model_fields_set & {"teachers", "each"}) != 1:
            raise ValueError("needs teachers or each, one of them")
        return self


class Settings(Section):
    """What the workflow computes."""

    results: Text = "results"
    """The folder that holds everything that is computed, logs and benchmarks included."""
    hardware: HardwareSettings = HardwareSettings()
    """What the cluster's GPUs and nodes are."""
    launcher: Text | None = None
    """What starts a distillation, as LAUNCHER NODES GPUS_PER_NODE MINUTES distill ...; if left out,
    workflow/scripts/launch.sh, which starts a torchrun on every node, through Slurm's srun."""
    datasets: dict[Name, DatasetSettings] = Field(default={})
    """Texts, by name."""
    tokens: TokensSettings | None = None
    """The token sequences of every teacher that has none of its own; the paper's if left out."""
    teachers: dict[Name, TeacherSettings]
    """Trained models, by name: Mixture-of-Experts models, and dense ones."""
    grid: GridSettings = GridSettings()
    """What the grid crosses with every scoring method and every K."""
    students: dict[Name, StudentSettings] = Field(default={})
    """Ways to a student, by name; for any teacher of enough experts."""
    recipes: dict[Name, RecipeSettings] = Field(default={})
    """Distillation settings, by name."""
    evaluations: dict[Name, EvaluationSettings] = Field(default={})
    """What models are scored on, by name."""
    pipelines: dict[Name, PipelineSettings]
    """Targets of the workflow, by name."""


if __name__ == "__main__":
    print(json.dumps(Settings.model_json_schema(), indent=1))
