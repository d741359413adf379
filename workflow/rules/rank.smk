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


def rankings_in(results, wildcards):
    """The ranking that a grid or a student is made from; before it is chosen, all it may be."""
    teacher = wildcards.teacher
    scorings = (
        [wildcards.scoring]
        if "scoring" in wildcards.keys()
        else choices.scorings_of(config, teacher, wildcards.student)
    )
    own = "" if "scoring" in wildcards.keys() else folded(student_of(wildcards))
    return [f"{results}/{teacher}/rankings{own}/{scoring}.json" for scoring in scorings]


def ranking_of(wildcards):
    """That ranking, never a reason to re-run by its age."""
    return ancient(rankings_in("<results>", wildcards))


def ranking_digest(wildcards):
    """Digest of that ranking's content, empty before it exists."""
    files = [Path(file) for file in rankings_in(config["results"], wildcards)]
    if len(files) > 1 or not files[0].is_file():
        return ""
    return hashlib.sha256(files[0].read_bytes()).hexdigest()[:16]


def choice_of(wildcards):
    """What a student's making was decided from: its ranking, and the grids where those chose it."""
    if student_kind(student_of(wildcards)) != "experts":
        return []
    chosen = choices.from_grids(config, wildcards.student)
    grids = choices.grids_of(config, wildcards.teacher, chosen[0] if chosen else [])
    return ancient(rankings_in("<results>", wildcards) + grids)


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
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        code=lambda wildcards: code("m2d.statistics.rank", scoring=[wildcards.scoring]),
    shell:
        """
        m2d rank {output:q} --statistics {input.statistics:q} --gram {input.gram:q} \
            --scoring {wildcards.scoring:q} 2>{log:q}
        """


checkpoint rank_folded_experts:
    """Order the folded experts of every layer by one scoring method."""
    input:
        statistics="<results>/{teacher}/statistics.parquet",
        gram="<results>/{teacher}/gram-fold-{fold}.safetensors",
    output:
        "<results>/{teacher}/rankings-fold-{fold}/{scoring}.json",
    log:
        "<logs>/rank_folded_experts/{teacher}/{fold}/{scoring}.log",
    benchmark:
        "<benchmarks>/rank_folded_experts/{teacher}/{fold}/{scoring}.tsv"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        code=lambda wildcards: code("m2d.statistics.rank", scoring=[wildcards.scoring]),
    shell:
        """
        m2d rank {output:q} --statistics {input.statistics:q} --gram {input.gram:q} \
            --scoring {wildcards.scoring:q} 2>{log:q}
        """
