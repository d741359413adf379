# Refit: a student's down projections solved anew in closed form, where the config asks for it.
# in:  a teacher, <results>/{teacher}/students/{student}/merged/, tokens/calibration.safetensors
# out: <results>/{teacher}/students/{student}/refit/


def refit_options(wildcards):
    student = student_of(wildcards)
    weighting = student.get("weighting", "equal")
    settings = {"variant": student["refit"], "weighting": weighting}
    return as_options(settings, ("variant", "weighting"))


rule refit_student:
    """Solve one student's down projections."""
    input:
        student="<results>/{teacher}/students/{student}/merged",
        tokens="<results>/{teacher}/tokens/calibration.safetensors",
        choice=choice_of,
        teacher=teacher_files,
    output:
        directory("<results>/{teacher}/students/{student}/refit"),
    log:
        "<logs>/refit_student/{teacher}/{student}.log",
    benchmark:
        "<benchmarks>/refit_student/{teacher}/{student}.tsv"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("refit_student", "gpu"),
        mem_mb=sized("refit_student", "mem_mb"),
        runtime=sized("refit_student", "runtime"),
    params:
        model=model_of,
        variant=refit_options,
        options=compute_options,
        code=teacher_code("m2d.refit.refit"),
    shell:
        """
        m2d refit {input.student:q} {params.model:q} {output:q} --tokens {input.tokens:q} \
            {params.variant:q} {params.options:q} 2>{log:q}
        """
