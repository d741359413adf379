# Scores on lm-eval's tasks, of teachers, students and distilled students.
# in:  a model folder; <results>/tasks/ for the demo's tasks
# out: <results>/{teacher}/teacher.eval/{task}.json, students/{student}/{variant}.eval/{task}.json


rule evaluate_teacher:
    """Score a teacher on one task."""
    input:
        tasks=task_definitions,
        teacher=teacher_files,
    output:
        "<results>/{teacher}/teacher.eval/{task}.json",
    log:
        "<logs>/evaluate_teacher/{teacher}/{task}.log",
    benchmark:
        "<benchmarks>/evaluate_teacher/{teacher}/{task}.tsv"
    conda:
        "m2d"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=memory,
        runtime=minutes,
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        dtype=lambda wildcards: teacher_of(wildcards)["dtype"],
        options=task_options,
        include=lambda wildcards, input: (
            f"--include {input.tasks}" if input.tasks else ""
        ),
        code=code("m2d.stages.evaluate"),
    shell:
        """
        m2d evaluate {params.model} {output} {params.options} {params.include} \
            --dtype {params.dtype} >{log} 2>&1
        """


rule evaluate_student:
    """Score a student, merged or distilled, on one task."""
    input:
        model="<results>/{teacher}/students/{student}/{variant}",
        tasks=task_definitions,
        ranking=ranking_of,
    output:
        "<results>/{teacher}/students/{student}/{variant}.eval/{task}.json",
    log:
        "<logs>/evaluate_student/{teacher}/{student}/{variant}/{task}.log",
    benchmark:
        "<benchmarks>/evaluate_student/{teacher}/{student}/{variant}/{task}.tsv"
    conda:
        "m2d"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=memory,
        runtime=minutes,
    params:
        dtype=lambda wildcards: teacher_of(wildcards)["dtype"],
        options=task_options,
        include=lambda wildcards, input: (
            f"--include {input.tasks}" if input.tasks else ""
        ),
        code=code("m2d.stages.evaluate"),
    shell:
        """
        m2d evaluate {input.model} {output} {params.options} {params.include} \
            --dtype {params.dtype} >{log} 2>&1
        """
