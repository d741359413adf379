# Tables, figures and model cards of everything that a pipeline measured.
# in:  grids, perplexities, scores and students of the pipeline; the teachers' statistics
# out: <results>/tables/{pipeline}/*.{csv,md,parquet,html}, <results>/figures/{pipeline}/*.{svg,png},
#      <results>/cards/{pipeline}/{teacher}.{student}.{variant}.md


def package_file(name):
    """Digest of a file of the package that a job reads."""
    return hashlib.sha256((PACKAGE / name).read_bytes()).hexdigest()[:16]


rule make_tables:
    """Gather a pipeline's results."""
    input:
        grids=lambda wildcards: grids_of(wildcards.pipeline),
        perplexities=lambda wildcards: perplexities_of(wildcards.pipeline),
        evaluations=lambda wildcards: evaluations_of(wildcards.pipeline),
        models=lambda wildcards: models_of(wildcards.pipeline),
        rankings=lambda wildcards: rankings_of(wildcards.pipeline),
    output:
        report(
            directory("<results>/tables/{pipeline}"),
            patterns=["{table}.html"],
            caption="../report/tables.rst",
            category="Tables",
            labels={"pipeline": "{pipeline}", "table": "{table}"},
        ),
    log:
        "<logs>/make_tables/{pipeline}.log",
    benchmark:
        "<benchmarks>/make_tables/{pipeline}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        provenance=lambda wildcards, input: [
            f"{model}/m2d.json" for model in input.models
        ],
        benchmarks=f"{config['results']}/benchmarks",
        published=package_file("report/published_results.csv"),
        code=code("m2d.report.tables"),
    shell:
        """
        m2d tables {output:q} --grid {input.grids:q} --perplexity {input.perplexities:q} \
            --evaluation {input.evaluations:q} --provenance {params.provenance:q} \
            --benchmarks {params.benchmarks:q} 2>{log:q}
        """


rule draw_figures:
    """Draw a pipeline's results."""
    input:
        grids=lambda wildcards: grids_of(wildcards.pipeline),
        perplexities=lambda wildcards: perplexities_of(wildcards.pipeline),
        evaluations=lambda wildcards: evaluations_of(wildcards.pipeline),
        models=lambda wildcards: models_of(wildcards.pipeline),
        statistics=lambda wildcards: statistics_of(wildcards.pipeline),
        gram=lambda wildcards: gram_of(wildcards.pipeline),
        rankings=lambda wildcards: rankings_of(wildcards.pipeline),
    output:
        report(
            directory("<results>/figures/{pipeline}"),
            patterns=["{figure}.svg"],
            caption="../report/figures.rst",
            category="Figures",
            labels={"pipeline": "{pipeline}", "figure": "{figure}"},
        ),
    log:
        "<logs>/draw_figures/{pipeline}.log",
    benchmark:
        "<benchmarks>/draw_figures/{pipeline}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        provenance=lambda wildcards, input: [
            f"{model}/m2d.json" for model in input.models
        ],
        metrics=lambda wildcards: metrics_of(wildcards.pipeline),
        code=code("m2d.report.figures"),
    shell:
        """
        m2d figures {output:q} --grid {input.grids:q} --perplexity {input.perplexities:q} \
            --evaluation {input.evaluations:q} --provenance {params.provenance:q} \
            --statistics {input.statistics:q} --gram {input.gram:q} \
            --metrics {params.metrics:q} 2>{log:q}
        """


rule write_cards:
    """Write the pipeline's scores into its students' model cards.

    Each student's README.md is renewed in its folder, and copied to the output. That makes nothing
    run again: the age of a folder is that of the job that made it.
    """
    input:
        models=lambda wildcards: models_of(wildcards.pipeline),
        perplexities=lambda wildcards: perplexities_of(wildcards.pipeline),
        evaluations=lambda wildcards: evaluations_of(wildcards.pipeline),
        calibrations=lambda wildcards: calibrations_of(wildcards.pipeline),
        rankings=lambda wildcards: rankings_of(wildcards.pipeline),
    output:
        directory("<results>/cards/{pipeline}"),
    log:
        "<logs>/write_cards/{pipeline}.log",
    benchmark:
        "<benchmarks>/write_cards/{pipeline}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        wording=lambda wildcards: code(
            "m2d.students.card:model_card",
            words=True,
            **by_pipeline(config, wildcards.pipeline),
        ),
        code=code("m2d.report.cards"),
    shell:
        """
        m2d card --out {output:q} {input.models:q} --perplexity {input.perplexities:q} \
            --evaluation {input.evaluations:q} --tokens {input.calibrations:q} 2>{log:q}
        """
