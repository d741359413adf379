# Students: the kept experts merged into one dense FFN per layer.
# in:  a teacher, its statistics, one ranking; the grids that choose the student, where some do
# out: <results>/{teacher}/students/{student}/merged/ (a stock model folder; how many files its
#      weights take is known to the stage alone, hence a directory)


def students_of_kind(*kinds):
    """A wildcard constraint: the config's students of these kinds."""
    return any_of(n for n, s in config["students"].items() if student_kind(s) in kinds)


def merge_settings(wildcards):
    """What of a student's settings its merging reads."""
    student = student_of(wildcards)
    keys = ("scoring", "grouping", "scaling", "keep", "groups")
    return {key: student[key] for key in keys if key in student}


def merge_code(wildcards):
    student = student_of(wildcards)
    uses = {kind: [student[kind]] for kind in ("grouping", "scaling")}
    return teacher_code("m2d.students.merge", scoring=[], neurons=[], **uses)(wildcards)


rule merge_student:
    """Write one student."""
    input:
        statistics="<results>/{teacher}/statistics.parquet",
        gram=lambda wildcards: f"<results>/{{teacher}}/gram{folded(student_of(wildcards))}.safetensors",
        fold=lambda wildcards: fold_of(wildcards, student_of(wildcards).get("fold")),
        ranking=ranking_of,
        choice=choice_of,
        teacher=teacher_files,
    output:
        directory("<results>/{teacher}/students/{student}/merged"),
    log:
        "<logs>/merge_student/{teacher}/{student}.log",
    benchmark:
        "<benchmarks>/merge_student/{teacher}/{student}.tsv"
    wildcard_constraints:
        student="|".join(
            [students_of_kind("experts", "chosen"), choices.BEST, choices.DESCRIBED]
        ),
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=sized("merge_student", "mem_mb"),
        runtime=sized("merge_student", "runtime"),
    params:
        model=model_of,
        student=merge_settings,
        groups=lambda wildcards: as_options(student_of(wildcards), ["groups"]),
        fold=fold_options,
        ranking=ranking_digest,
        code=merge_code,
    shell:
        """
        m2d merge {params.model:q} {output:q} --statistics {input.statistics:q} --gram {input.gram:q} \
            --ranking {input.ranking:q} --grouping {params.student[grouping]:q} \
            --scaling {params.student[scaling]:q} --keep {params.student[keep]:q} \
            {params.groups:q} {params.fold:q} 2>{log:q}
        """
