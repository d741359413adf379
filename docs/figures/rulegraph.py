"""The rule graph of docs/cluster.md: `make rulegraph` (needs graphviz).

Reads what `snakemake --rulegraph` prints on stdin and writes a graph that can be read, as dot:
without targets, the evaluations of one kind as one rule, and no arrow that others imply.
"""

import re
import sys

import networkx as nx

# Rules by where they stand, for the colours.
STAGES = {
    "#dbe9f6": ("download_teacher", "make_corpus", "make_tasks", "make_tokens"),
    "#fde5c8": ("compute_statistics", "compute_gram", "compute_share", "combine_statistics",
                "measure_neurons", "fold_teacher", "compute_folded_gram", "rank_experts",
                "rank_folded_experts", "measure_grid"),
    "#d9efd5": ("merge_student", "merge_neurons", "prune_student", "initialise_student",
                "refit_student", "align_student", "distill_student"),
    "#ecdff0": ("measure_teacher", "measure_student", "evaluate_teacher", "evaluate_student"),
    "#e6e6e6": ("make_tables", "draw_figures", "write_cards"),
}  # fmt: skip


def name_of(rule: str) -> str:
    """evaluate_student_mmlu is one of evaluate_student."""
    return re.sub(r"^(evaluate_(?:teacher|student))_\w+$", r"\1", rule)


def main() -> None:
    text = sys.stdin.read()
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', text))
    graph = nx.DiGraph()
    for start, end in re.findall(r"(\d+) -> (\d+)", text):
        a, b = name_of(names[start]), name_of(names[end])
        if a != b and not b.startswith(("all_", "tables")):
            graph.add_edge(a, b)
    colours = {rule: colour for colour, rules in STAGES.items() for rule in rules}
    print("digraph rules {\n  rankdir=TB; nodesep=0.25; ranksep=0.4; margin=0.1;")
    print('  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=13];')
    print('  edge [color="#707070"];')
    for rule in sorted(graph):
        print(f'  {rule} [fillcolor="{colours[rule]}"];')
    for start, end in sorted(nx.transitive_reduction(graph).edges):
        print(f"  {start} -> {end};")
    print("}")


if __name__ == "__main__":
    main()
