# The targets: every pipeline of the config, and the tables of all of them.


for pipeline in config["pipelines"]:

    rule:
        name:
            pipeline
        input:
            results_of(pipeline),


rule all:
    """Every pipeline."""
    input:
        [results_of(pipeline) for pipeline in config["pipelines"]],


rule tables:
    """The tables, figures and model cards of every pipeline."""
    input:
        [results_of(pipeline) for pipeline in config["pipelines"]],


rule all_evals:
    """Perplexities and scores of every pipeline."""
    input:
        [perplexities_of(pipeline) for pipeline in config["pipelines"]],
        [evaluations_of(pipeline) for pipeline in config["pipelines"]],
