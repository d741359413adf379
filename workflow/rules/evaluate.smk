# Scores on lm-eval's tasks, of teachers, students and distilled students.
# in:  a model folder; <results>/tasks/ for the demo's tasks
# out: <results>/{teacher}/teacher.eval/{task}.json, students/{student}/{variant}.eval/{task}.json
#
# One rule per evaluation of the config, since an evaluation's tasks are its outputs: it loads the
# model once for all of them.

for evaluation in config["evaluations"]:

    rule:
        """Score a teacher on the tasks of one evaluation."""
        name:
            f"evaluate_teacher_{evaluation}"
        input:
            tasks=task_definitions(evaluation),
            teacher=teacher_files,
        output:
            scores_of("<results>/{teacher}/teacher", evaluation),
        log:
            f"<logs>/evaluate_teacher/{{teacher}}/{evaluation}.log",
        benchmark:
            f"<benchmarks>/evaluate_teacher/{{teacher}}/{evaluation}.tsv"
        conda:
            "../envs/m2d.yaml"
        threads: 1
        resources:
            gpu=sized("evaluate_teacher", "gpu", evaluation=evaluation),
            mem_mb=sized("evaluate_teacher", "mem_mb", evaluation=evaluation),
            runtime=sized("evaluate_teacher", "runtime", evaluation=evaluation),
        params:
            model=lambda wildcards: teacher_of(wildcards)["model"],
            out=evaluation_out,
            options=evaluation_options(evaluation),
            dtype=lambda wildcards: teacher_of(wildcards)["dtype"],
            include=lambda wildcards, input: (
                f"--include {input.tasks}" if input.tasks else ""
            ),
            code=code("m2d.stages.evaluate"),
        shell:
            """
            m2d evaluate {params.model} {params.out} {params.options} {params.include} \
                --dtype {params.dtype} >{log} 2>&1
            """

    rule:
        """Score a student, merged or distilled, on the tasks of one evaluation."""
        name:
            f"evaluate_student_{evaluation}"
        input:
            model="<results>/{teacher}/students/{student}/{variant}",
            tasks=task_definitions(evaluation),
            choice=choice_of,
        output:
            scores_of("<results>/{teacher}/students/{student}/{variant}", evaluation),
        log:
            f"<logs>/evaluate_student/{{teacher}}/{{student}}/{{variant}}/{evaluation}.log",
        benchmark:
            f"<benchmarks>/evaluate_student/{{teacher}}/{{student}}/{{variant}}/{evaluation}.tsv"
        conda:
            "../envs/m2d.yaml"
        threads: 1
        resources:
            gpu=sized("evaluate_student", "gpu", evaluation=evaluation),
            mem_mb=sized("evaluate_student", "mem_mb", evaluation=evaluation),
            runtime=sized("evaluate_student", "runtime", evaluation=evaluation),
        params:
            out=evaluation_out,
            options=evaluation_options(evaluation),
            dtype=lambda wildcards: teacher_of(wildcards)["dtype"],
            include=lambda wildcards, input: (
                f"--include {input.tasks}" if input.tasks else ""
            ),
            code=code("m2d.stages.evaluate"),
        shell:
            """
            m2d evaluate {input.model} {params.out} {params.options} {params.include} \
                --dtype {params.dtype} >{log} 2>&1
            """
