# Baselines: students that are not made of experts (docs/baselines.md). They are distilled, measured
# and tabulated like any other student.
# in:  a dense teacher and <results>/{teacher}/tokens/calibration.safetensors (d2d), or an MoE teacher
# out: <results>/{teacher}/students/{student}/pruned/ (d2d) or initial/

from m2d.pipeline.settings import SHAPE


rule prune_student:
    """Prune a dense teacher to a student's sizes."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        teacher=teacher_files,
    output:
        directory("<results>/{teacher}/students/{student}/pruned"),
    log:
        "<logs>/prune_student/{teacher}/{student}.log",
    benchmark:
        "<benchmarks>/prune_student/{teacher}/{student}.tsv"
    wildcard_constraints:
        student=students_of_kind("d2d"),
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("prune_student", "gpu"),
        mem_mb=sized("prune_student", "mem_mb"),
        runtime=sized("prune_student", "runtime"),
    params:
        model=model_of,
        shape=lambda wildcards: as_options(student_of(wildcards), SHAPE),
        options=compute_options,
        code=teacher_code("m2d.baselines.prune"),
    shell:
        """
        m2d prune {params.model:q} {output:q} --tokens {input.calibration:q} {params.shape:q} \
            {params.options:q} 2>{log:q}
        """


rule initialise_student:
    """Write a student with new weights in its FFNs, or everywhere."""
    input:
        teacher=teacher_files,
    output:
        directory("<results>/{teacher}/students/{student}/initial"),
    log:
        "<logs>/initialise_student/{teacher}/{student}.log",
    benchmark:
        "<benchmarks>/initialise_student/{teacher}/{student}.tsv"
    wildcard_constraints:
        student=students_of_kind("random_ffn", "random_init"),
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=sized("initialise_student", "mem_mb"),
        runtime=sized("initialise_student", "runtime"),
    params:
        model=model_of,
        kind=lambda wildcards: config["students"][wildcards.student]["baseline"],
        code=teacher_code("m2d.baselines.random"),
    shell:
        """
        m2d baseline {params.model:q} {output:q} --kind {params.kind:q} 2>{log:q}
        """
