# Rankings: the experts of every layer in the order of one scoring method.
# in:  <results>/{teacher}/statistics.parquet, gram.safetensors
# out: <results>/{teacher}/rankings/{scoring}.json
#
# The cut-off. Snakemake re-runs whatever is downstream of a job that runs, even if its output comes
# out the same. Not so here: an edited scoring method re-runs its ranking, and what follows re-runs
# only if the ranking differs, in the same invocation. Three things make that work together:
# - Downstream rules take rankings as ancient(): a ranking that is written again re-runs nothing.
# - Those that read one carry the digest of its content as a parameter (ranking_digest).
# - rank_experts is a checkpoint: when it is done, Snakemake evaluates the parameters of the rules
#   that take its output once more, and so sees the new digest.
# Rules further down (distillation, evaluation, tables) take the ranking too (choice_of), although
# they do not read it: so none of them starts before it is known whether what it reads will change.
# A dry run shows the rankings alone, since only they can tell what follows.


checkpoint rank_experts:
    """Order the experts of every layer by one scoring method."""
    input:
        statistics="<results>/{teacher}/statistics.parquet",
        gram="<results>/{teacher}/gram.safetensors",
    output:
        "<results>/{teacher}/rankings/{scoring}.json",
    log:
        "<logs>/rank_experts/{teacher}/{scoring}.log",
    benchmark:
        "<benchmarks>/rank_experts/{teacher}/{scoring}.tsv"
    conda:
        "../envs/m2d.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        code=lambda wildcards: code("m2d.statistics.rank", scoring=[wildcards.scoring]),
    shell:
        """
        m2d rank {output} --statistics {input.statistics} --gram {input.gram} \
            --scoring {wildcards.scoring} 2>{log}
        """
