# The demo's texts: a corpus from the documentation of the installed packages, and tasks from it.
# out: <results>/corpus/{train,calibration,test}.jsonl, <results>/tasks/


rule make_corpus:
    """Gather the documentation of the installed packages, split by document."""
    output:
        train="<results>/corpus/train.jsonl",
        calibration="<results>/corpus/calibration.jsonl",
        test="<results>/corpus/test.jsonl",
    log:
        "<logs>/make_corpus.log",
    benchmark:
        "<benchmarks>/make_corpus.tsv"
    conda:
        ENVIRONMENT
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        folder=subpath(output.train, parent=True),
        code=code("m2d.demo.corpus:write_corpus"),
    shell:
        """
        m2d demo corpus {params.folder:q} 2>{log:q}
        """


rule make_tasks:
    """Make multiple-choice questions from the held-out documents."""
    input:
        test="<results>/corpus/test.jsonl",
    output:
        tasks=directory("<results>/tasks"),
    log:
        "<logs>/make_tasks.log",
    benchmark:
        "<benchmarks>/make_tasks.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        folder=subpath(input.test, parent=True),
        code=code("m2d.demo.tasks:write_demo_tasks"),
    shell:
        """
        m2d demo tasks {params.folder:q} {output.tasks:q} 2>{log:q}
        """
