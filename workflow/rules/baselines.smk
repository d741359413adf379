# Baselines: students that are not made of experts (docs/baselines.md). They are distilled, measured
# and tabulated like any other student.
# in:  a dense teacher and <results>/{teacher}/tokens/calibration.safetensors (d2d), or an MoE teacher
# out: <results>/{teacher}/students/{student}/merged/


rule prune_student:
    """Prune a dense teacher to a student's sizes."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        teacher=teacher_files,
    output:
        directory("<results>/{teacher}/students/{student}/merged"),
    log:
        "<logs>/prune_student/{teacher}/{student}.log",
    benchmark:
        "<benchmarks>/prune_student/{teacher}/{student}.tsv"
    wildcard_constraints:
        student=students_of_kind("d2d"),
    conda:
        "../envs/m2d.yaml"
    threads: 1
    resources:
        gpu=sized("prune_student", "gpu"),
        mem_mb=sized("prune_student", "mem_mb"),
        runtime=sized("prune_student", "runtime"),
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        shape=shape_options,
        options=compute_options,
        code=code("m2d.baselines.prune"),
    shell:
        """
        m2d prune {params.model} {output} --tokens {input.calibration} {params.shape} \
            {params.options} 2>{log}
        """


rule initialise_student:
    """Write a student with new weights in its FFNs, or everywhere."""
    input:
        teacher=teacher_files,
    output:
        directory("<results>/{teacher}/students/{student}/merged"),
    log:
        "<logs>/initialise_student/{teacher}/{student}.log",
    benchmark:
        "<benchmarks>/initialise_student/{teacher}/{student}.tsv"
    wildcard_constraints:
        student=students_of_kind("random_ffn", "random_init"),
    conda:
        "../envs/m2d.yaml"
    threads: 1
    resources:
        mem_mb=sized("initialise_student", "mem_mb"),
        runtime=sized("initialise_student", "runtime"),
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        kind=lambda wildcards: config["students"][wildcards.student]["baseline"],
        code=code("m2d.baselines.random"),
    shell:
        """
        m2d baseline {params.model} {output} --kind {params.kind} 2>{log}
        """
