# What the calibration tokens say of the experts: everything about choosing them follows from this.
# in:  a teacher, <results>/{teacher}/tokens/calibration.safetensors
# out: <results>/{teacher}/statistics.parquet, gram.safetensors
#
# With `--cache` and SNAKEMAKE_OUTPUT_CACHE set, other folders and users share what one has computed:
# equal are the code, the options, the tokens and the teacher's files, whatever the environment.
# Snakemake allows no benchmark where a result may come from the cache; scripts/timed.py writes it.
#
# A teacher with `shares: N` has N jobs take a share of the sequences each, for both kinds, and one
# more add them up: bit for bit what one job would compute.

# The command that takes shares of a statistics file, and its code.
SHARED_BY = {"statistics.parquet": "stats", "gram.safetensors": "gram"}
SHARE_CODE = {"stats": "m2d.statistics.routing", "gram": "m2d.statistics.gram"}


def shares_of(teacher):
    """Jobs that share a teacher's statistics; None where one takes all."""
    return config["teachers"][teacher].get("shares")


def share_files(wildcards):
    kind, shares = SHARED_BY[wildcards.statistics], shares_of(wildcards.teacher)
    return [
        f"<results>/{wildcards.teacher}/shares/{kind}-{i}-of-{shares}.safetensors"
        for i in range(1, shares + 1)
    ]


rule compute_statistics:
    """Routing statistics of every layer and expert."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        teacher=teacher_files,
    output:
        "<results>/{teacher}/statistics.parquet",
    log:
        "<logs>/compute_statistics/{teacher}.log",
    wildcard_constraints:
        teacher=any_of(name for name in config["teachers"] if not shares_of(name)),
    cache: "omit-software"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("compute_statistics", "gpu"),
        mem_mb=sized("compute_statistics", "mem_mb"),
        runtime=sized("compute_statistics", "runtime"),
    params:
        model=model_of,
        options=compute_options,
        timed=script("timed.py"),
        code=teacher_code("m2d.statistics.routing"),
    shell:
        """
        python {params.timed:q} {log:q} \
            m2d stats {params.model:q} {output:q} --tokens {input.calibration:q} \
            {params.options:q} 2>{log:q}
        """


rule compute_gram:
    """Gram statistics: inner products of all experts' outputs, weights and router rows."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        teacher=teacher_files,
    output:
        "<results>/{teacher}/gram.safetensors",
    log:
        "<logs>/compute_gram/{teacher}.log",
    wildcard_constraints:
        teacher=any_of(name for name in config["teachers"] if not shares_of(name)),
    cache: "omit-software"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("compute_gram", "gpu"),
        mem_mb=sized("compute_gram", "mem_mb"),
        runtime=sized("compute_gram", "runtime"),
    params:
        model=model_of,
        options=compute_options,
        timed=script("timed.py"),
        code=teacher_code("m2d.statistics.gram"),
    shell:
        """
        python {params.timed:q} {log:q} \
            m2d gram {params.model:q} {output:q} --tokens {input.calibration:q} \
            {params.options:q} 2>{log:q}
        """


rule compute_share:
    """A share of the routing (stats) or Gram statistics (gram)."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        teacher=teacher_files,
    output:
        temp("<results>/{teacher}/shares/{kind}-{share}-of-{shares}.safetensors"),
    log:
        "<logs>/compute_share/{teacher}/{kind}-{share}-of-{shares}.log",
    benchmark:
        "<benchmarks>/compute_share/{teacher}/{kind}-{share}-of-{shares}.tsv"
    wildcard_constraints:
        kind="stats|gram",
        share="[0-9]+",
        shares="[0-9]+",
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("compute_share", "gpu"),
        mem_mb=sized("compute_share", "mem_mb"),
        runtime=sized("compute_share", "runtime"),
    params:
        model=model_of,
        options=compute_options,
        code=lambda wildcards: teacher_code(SHARE_CODE[wildcards.kind])(wildcards),
    shell:
        """
        m2d {wildcards.kind:q} {params.model:q} {output:q} --tokens {input.calibration:q} \
            --share {wildcards.share:q}/{wildcards.shares:q} {params.options:q} 2>{log:q}
        """


rule combine_statistics:
    """Add up the shares of the routing or Gram statistics."""
    input:
        share_files,
    output:
        "<results>/{teacher}/{statistics}",
    log:
        "<logs>/combine_statistics/{teacher}/{statistics}.log",
    benchmark:
        "<benchmarks>/combine_statistics/{teacher}/{statistics}.tsv"
    wildcard_constraints:
        teacher=any_of(filter(shares_of, config["teachers"])),
        statistics=any_of(SHARED_BY),
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        code=code("m2d.statistics.shards"),
    shell:
        """
        m2d combine {output:q} {input:q} 2>{log:q}
        """
