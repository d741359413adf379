# Perplexity on the test tokens, of teachers, students and distilled students.
# in:  a model folder, <results>/{teacher}/tokens/test.safetensors
# out: <results>/{teacher}/perplexity.json, students/{student}/{variant}.perplexity.json


rule measure_teacher:
    """Perplexity of a teacher."""
    input:
        tokens="<results>/{teacher}/tokens/test.safetensors",
        teacher=teacher_files,
    output:
        "<results>/{teacher}/perplexity.json",
    log:
        "<logs>/measure_teacher/{teacher}.log",
    benchmark:
        "<benchmarks>/measure_teacher/{teacher}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("measure_teacher", "gpu"),
        mem_mb=sized("measure_teacher", "mem_mb"),
        runtime=sized("measure_teacher", "runtime"),
    params:
        model=model_of,
        options=compute_options,
        code=teacher_code("m2d.evaluate.perplexity"),
    shell:
        """
        m2d perplexity {params.model:q} --tokens {input.tokens:q} --out {output:q} \
            {params.options:q} >{log:q} 2>&1
        """


rule measure_student:
    """Perplexity of a student, merged or distilled."""
    input:
        model="<results>/{teacher}/students/{student}/{variant}",
        tokens="<results>/{teacher}/tokens/test.safetensors",
        choice=choice_of,
    output:
        "<results>/{teacher}/students/{student}/{variant}.perplexity.json",
    log:
        "<logs>/measure_student/{teacher}/{student}/{variant}.log",
    benchmark:
        "<benchmarks>/measure_student/{teacher}/{student}/{variant}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("measure_student", "gpu"),
        mem_mb=sized("measure_student", "mem_mb"),
        runtime=sized("measure_student", "runtime"),
    params:
        options=compute_options,
        code=teacher_code("m2d.evaluate.perplexity"),
    shell:
        """
        m2d perplexity {input.model:q} --tokens {input.tokens:q} --out {output:q} \
            {params.options:q} >{log:q} 2>&1
        """
