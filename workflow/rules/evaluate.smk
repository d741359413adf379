# Scores on lm-eval's tasks, of teachers, students and distilled students.
# in:  a model folder; <results>/tasks/ for the demo's tasks
# out: <results>/{teacher}/teacher.eval/{task}.json, students/{student}/{variant}.eval/{task}.json
#
# One rule per task, so that a new task is scored alone; `together` makes one rule of an evaluation,
# which loads the model once for all its tasks.

for name, (evaluation, tasks) in evaluation_jobs(config).items():

    rule:
        """Score a teacher."""
        name:
            f"evaluate_teacher_{name}"
        input:
            tasks=task_definitions(evaluation),
            teacher=teacher_files,
        output:
            scores_of("<results>/{teacher}/teacher", tasks),
        log:
            f"<logs>/evaluate_teacher/{{teacher}}/{name}.log",
        benchmark:
            f"<benchmarks>/evaluate_teacher/{{teacher}}/{name}.tsv"
        conda:
            "../envs/m2d.yaml"
        threads: 1
        resources:
            gpu=sized("evaluate_teacher", "gpu", evaluation=name),
            mem_mb=sized("evaluate_teacher", "mem_mb", evaluation=name),
            runtime=sized("evaluate_teacher", "runtime", evaluation=name),
        params:
            model=lambda wildcards: teacher_of(wildcards)["model"],
            out=evaluation_out,
            options=evaluation_options(evaluation, tasks),
            dtype=lambda wildcards: teacher_of(wildcards)["dtype"],
            code=code("m2d.evaluate.lm_eval"),
        shell:
            """
            m2d evaluate {params.model} {params.out} {params.options} \
                --dtype {params.dtype} >{log} 2>&1
            """

    rule:
        """Score a student, before or after distillation."""
        name:
            f"evaluate_student_{name}"
        input:
            model="<results>/{teacher}/students/{student}/{variant}",
            tasks=task_definitions(evaluation),
            choice=choice_of,
        output:
            scores_of("<results>/{teacher}/students/{student}/{variant}", tasks),
        log:
            f"<logs>/evaluate_student/{{teacher}}/{{student}}/{{variant}}/{name}.log",
        benchmark:
            f"<benchmarks>/evaluate_student/{{teacher}}/{{student}}/{{variant}}/{name}.tsv"
        conda:
            "../envs/m2d.yaml"
        threads: 1
        resources:
            gpu=sized("evaluate_student", "gpu", evaluation=name),
            mem_mb=sized("evaluate_student", "mem_mb", evaluation=name),
            runtime=sized("evaluate_student", "runtime", evaluation=name),
        params:
            out=evaluation_out,
            options=evaluation_options(evaluation, tasks),
            dtype=lambda wildcards: teacher_of(wildcards)["dtype"],
            code=code("m2d.evaluate.lm_eval"),
        shell:
            """
            m2d evaluate {input.model} {params.out} {params.options} \
                --dtype {params.dtype} >{log} 2>&1
            """
