# Students: the kept experts merged into one dense FFN per layer.
# in:  a teacher, its statistics, one ranking; the grids that choose the student, where some do
# out: <results>/{teacher}/students/{student}/merged/ (a stock model folder; how many files its
#      weights take is known to the stage alone, hence a directory)


rule merge_student:
    """Write one student."""
    input:
        statistics="<results>/{teacher}/statistics.parquet",
        gram="<results>/{teacher}/gram.safetensors",
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
        student=f"{students_of_kind('experts', 'chosen')}|{BEST}",
    conda:
        "../envs/m2d.yaml"
    threads: 1
    resources:
        mem_mb=sized("merge_student", "mem_mb"),
        runtime=sized("merge_student", "runtime"),
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        student=merge_settings,
        ranking=ranking_digest,
        code=merge_code,
    shell:
        """
        m2d merge {params.model} {output} --statistics {input.statistics} --gram {input.gram} \
            --ranking {input.ranking} --grouping {params.student[grouping]} \
            --scaling {params.student[scaling]} --keep {params.student[keep]} 2>{log}
        """
