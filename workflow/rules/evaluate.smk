# Scores on lm-eval's tasks, of teachers, students and distilled students.
# in:  a model folder; <results>/tasks/ for the demo's tasks
# out: <results>/{teacher}/teacher.eval/{task}.json, students/{student}/{variant}.eval/{task}.json
#
# One rule per task, so that a new task is scored alone; `together` makes one rule of an evaluation,
# which loads the model once for all its tasks.

from m2d.pipeline.settings import evaluation_jobs


def task_definitions(evaluation):
    """The folder of the demo's tasks, for those."""
    return "<results>/tasks" if config["evaluations"][evaluation]["demo"] else []


def evaluation_out(wildcards, output):
    """`m2d evaluate` takes a file for one task and a folder for several."""
    return output[0] if len(output) == 1 else str(Path(output[0]).parent)


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
            ENVIRONMENT
        threads: 1
        resources:
            gpu=sized("evaluate_teacher", "gpu", evaluation=name),
            mem_mb=sized("evaluate_teacher", "mem_mb", evaluation=name),
            runtime=sized("evaluate_teacher", "runtime", evaluation=name),
        params:
            model=model_of,
            out=evaluation_out,
            options=commands.evaluation_options(config, evaluation, tasks),
            dtype=lambda wildcards: teacher_of(wildcards)["dtype"],
            code=teacher_code("m2d.evaluate.lm_eval"),
        shell:
            """
            m2d evaluate {params.model:q} {params.out:q} {params.options:q} \
                --dtype {params.dtype:q} >{log:q} 2>&1
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
            ENVIRONMENT
        threads: 1
        resources:
            gpu=sized("evaluate_student", "gpu", evaluation=name),
            mem_mb=sized("evaluate_student", "mem_mb", evaluation=name),
            runtime=sized("evaluate_student", "runtime", evaluation=name),
        params:
            out=evaluation_out,
            options=commands.evaluation_options(config, evaluation, tasks),
            dtype=lambda wildcards: teacher_of(wildcards)["dtype"],
            code=teacher_code("m2d.evaluate.lm_eval"),
        shell:
            """
            m2d evaluate {input.model:q} {params.out:q} {params.options:q} \
                --dtype {params.dtype:q} >{log:q} 2>&1
            """
