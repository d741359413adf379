# The targets: every pipeline of the config, and the tables of all of them.


for pipeline in config["pipelines"]:

    rule:
        name:
            pipeline
        input:
            f"<results>/tables/{pipeline}",
            f"<results>/figures/{pipeline}",


rule tables:
    """The tables and figures of every pipeline."""
    input:
        expand("<results>/tables/{pipeline}", pipeline=config["pipelines"]),
        expand("<results>/figures/{pipeline}", pipeline=config["pipelines"]),


rule all_evals:
    """Perplexities and scores of every pipeline."""
    input:
        [perplexities_of(pipeline) for pipeline in config["pipelines"]],
        [evaluations_of(pipeline) for pipeline in config["pipelines"]],
