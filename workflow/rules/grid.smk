# The grid: perplexity of every configuration of one scoring method, no student written.
# in:  a teacher, its statistics, one ranking, <results>/{teacher}/tokens/test.safetensors
# out: <results>/{teacher}/grid/{scoring}.parquet
#
# A checkpoint, since a grid decides which students are the best ones: as with rankings (rank.smk),
# those are made again only if the choice differs.


checkpoint measure_grid:
    """Perplexity of every grouping, scaling and K under one scoring method."""
    input:
        statistics="<results>/{teacher}/statistics.parquet",
        gram="<results>/{teacher}/gram.safetensors",
        ranking=ranking_of,
        tokens="<results>/{teacher}/tokens/test.safetensors",
        teacher=teacher_files,
    output:
        "<results>/{teacher}/grid/{scoring}.parquet",
    log:
        "<logs>/measure_grid/{teacher}/{scoring}.log",
    benchmark:
        "<benchmarks>/measure_grid/{teacher}/{scoring}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("measure_grid", "gpu"),
        mem_mb=sized("measure_grid", "mem_mb"),
        runtime=sized("measure_grid", "runtime"),
    params:
        model=model_of,
        keeps=lambda wildcards: ",".join(map(str, teacher_of(wildcards)["keeps"])),
        groupings=",".join(config["grid"]["groupings"]),
        scalings=",".join(config["grid"]["scalings"]),
        options=compute_options,
        ranking=ranking_digest,
        code=teacher_code(
            "m2d.students.grid",
            scoring=[],
            grouping=config["grid"]["groupings"],
            scaling=config["grid"]["scalings"],
        ),
    shell:
        """
        m2d grid {params.model:q} {output:q} --statistics {input.statistics:q} --gram {input.gram:q} \
            --ranking {input.ranking:q} --tokens {input.tokens:q} --keeps {params.keeps:q} \
            --groupings {params.groupings:q} --scalings {params.scalings:q} {params.options:q} 2>{log:q}
        """
