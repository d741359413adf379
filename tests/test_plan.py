"""Plans: what they hold, that they survive their file, and which of them give the same student."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from choose_layers import hand_layer, simulate

from m2d.choose.grouping import GROUPINGS
from m2d.choose.plan import (
    Group,
    LayerPlan,
    Plan,
    check_keep,
    distinct_plans,
    make_plan,
    plan_from_dict,
)
from m2d.choose.ranking import Ranking
from m2d.choose.scaling import SCALINGS
from m2d.choose.scoring import SCORINGS
from m2d.errors import UserError


def teacher():
    """Two layers of 12 experts, top-3."""
    return [simulate(seed=seed, index=index)[0] for seed, index in ((0, 1), (1, 3))]


def plan_of(scoring="gld_reap", grouping="round_robin", scaling="uniform", keep=6):
    layers = teacher()
    rankings = [SCORINGS[scoring](layer) for layer in layers]
    return make_plan(layers, rankings, grouping, scaling, keep, scoring=scoring)


def by_hand():
    return Plan(
        "reap",
        "weight_cluster",
        "proportional",
        4,
        (
            LayerPlan(0, (Group((0, 2), (0.75, 0.25), 0.5), Group((1, 3), (0.5, 0.5), -0.25))),
            LayerPlan(2, (Group((0,), (1.0,), 1.0), Group((1, 2, 3), (1.0, 0.0, 0.0), 2.0))),
        ),
    )


def test_plan_by_hand():
    layer = hand_layer(5, 2, weight_sum=[2, 2, 2, 1, 1], index=7)  # m = 0.8
    ranking = Ranking(np.array([3, 1, 4, 0, 2]), np.array([0.1, 0.6, 0.0, 0.9, 0.3]))
    plan = make_plan([layer], [ranking], "RR", "proportional", 4, scoring="DO-ACP")
    # Dealt: 3, 1, 4, 0 -> {3, 4}, {1, 0}; importance 1.2 and 0.7.
    assert plan.to_dict() == {
        "format": 1,
        "scoring": "gld_reap",
        "grouping": "round_robin",
        "scaling": "proportional",
        "keep": 4,
        "layers": [
            {
                "layer": 7,
                "groups": [
                    {
                        "experts": [0, 1],
                        "weights": pytest.approx([1 / 7, 6 / 7]),
                        "scale": pytest.approx(0.8 * 0.7 / 1.9),
                    },
                    {
                        "experts": [3, 4],
                        "weights": pytest.approx([0.75, 0.25]),
                        "scale": pytest.approx(0.8 * 1.2 / 1.9),
                    },
                ],
            }
        ],
    }


@pytest.mark.parametrize("scaling", [*SCALINGS.paper, "least_squares"])
@pytest.mark.parametrize("grouping", GROUPINGS.paper)
def test_plan_survives_its_file(grouping, scaling):
    for scoring, keep in itertools.product(SCORINGS, (3, 5, 12)):
        plan = plan_of(scoring, grouping, scaling, keep)
        text = json.dumps(plan.to_dict())
        read = plan_from_dict(json.loads(text), num_experts=12, expert_width=4, layers=[1, 3])
        assert read == plan
        assert json.dumps(read.to_dict()) == text
        assert [layer.width(4) for layer in read.layers] == [12, 12]


def test_neurons_survive_their_file():
    groups = (Group((4,), (1.0,), 0.3, (0, 5, 6)), Group((2, 1), (0.5, 0.5), 0.7))
    plan = Plan("neurons", "neurons", "uniform", None, (LayerPlan(0, groups),))
    read = plan_from_dict(json.loads(json.dumps(plan.to_dict())), num_experts=5, expert_width=8)
    assert read == plan
    assert read.layers[0].width(8) == 11
    whole = replace(plan, layers=(LayerPlan(0, (replace(groups[0], neurons=None), groups[1])),))
    assert whole.digest() != plan.digest()


def test_pure_pruning_is_the_same_for_every_grouping():
    for scaling in (*SCALINGS.paper, "least_squares"):
        plans = [
            plan_of(grouping=grouping, scaling=scaling, keep=3) for grouping in GROUPINGS.paper
        ]
        assert len(distinct_plans(plans)) == 1
        for layer in plans[0].layers:
            assert [group.weights for group in layer.groups] == [(1.0,)] * 3


def test_the_grid_has_no_more_students_than_it_must():
    plans = [
        plan_of(scoring, grouping, scaling, keep)
        for scoring in SCORINGS.paper
        for grouping in GROUPINGS.paper
        for scaling in SCALINGS.paper
        for keep in (3, 4, 6, 9, 12)
    ]
    assert len(plans) == 350
    distinct = distinct_plans(plans)
    # At K = k: 2 per scoring rather than 10; at most, since scorings may choose alike too.
    assert len(distinct) <= 350 - 7 * 8
    for digest, plan in distinct.items():
        assert plan.digest() == digest
    # The first of those alike is the one returned.
    assert next(iter(distinct.values())) is plans[0]
    students = {(student_key(plan)): plan.digest() for plan in plans}
    assert len(students) == len(set(students.values())) == len(distinct)


def student_key(plan):
    """What the student is made of, by other means than the digest's."""
    return tuple(
        (
            layer.layer,
            frozenset(
                (
                    frozenset(
                        (expert, f"{weight:.11e}")
                        for expert, weight in zip(group.experts, group.weights, strict=True)
                        if weight > 0
                    ),
                    f"{group.scale:.11e}",
                )
                for group in layer.groups
            ),
        )
        for layer in plan.layers
    )


def test_digest_ignores_what_changes_no_student():
    plan = by_hand()
    first, second = plan.layers
    same = [
        replace(plan, scoring="omp", grouping="round_robin", scaling="uniform", keep=None),
        replace(plan, layers=(second, first)),
        replace(plan, layers=(replace(first, groups=first.groups[::-1]), second)),
        with_group(plan, Group((2, 0), (0.25, 0.75), 0.5)),
        with_group(plan, Group((0, 2), (0.75, 0.25), 0.5 * (1 + 1e-15))),
        with_group(plan, Group((0, 2, 9), (0.75, 0.25, 0.0), 0.5)),
    ]
    assert {other.digest() for other in same} == {plan.digest()}
    assert len(distinct_plans([plan, *same])) == 1


def test_digest_tells_students_apart():
    plan = by_hand()
    first, second = plan.layers
    others = [
        with_group(plan, Group((0, 2), (0.25, 0.75), 0.5)),
        with_group(plan, Group((0, 4), (0.75, 0.25), 0.5)),
        with_group(plan, Group((0, 2), (0.75, 0.25), 0.5000001)),
        with_group(plan, Group((0, 2), (0.75, 0.25), -0.5)),
        with_group(plan, Group((0, 2), (0.75, 0.25), 0.5, (0, 1))),
        with_group(plan, Group((0, 2), (0.75, 0.25), 0.5, (0, 2))),
        replace(plan, layers=(first,)),
        replace(plan, layers=(first, replace(second, layer=3))),
        replace(plan, layers=(replace(first, layer=2), replace(second, layer=0))),
    ]
    digests = {other.digest() for other in [plan, *others]}
    assert len(digests) == 1 + len(others)
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)


def with_group(plan, group):
    """`plan` with the first group of its first layer replaced."""
    first, *rest = plan.layers
    return replace(plan, layers=(replace(first, groups=(group, *first.groups[1:])), *rest))


def test_digest_stays_the_same_between_versions():
    # The grid's file names its plans by digest: a change here makes every grid stale.
    assert by_hand().digest() == "4731218defaaf652"


@pytest.mark.parametrize("keep", [-1, 0, 2, 13])
def test_keep_outside_its_bounds_is_refused(keep):
    with pytest.raises(UserError, match=f"keep is {keep}; it must lie between 3 .* and 12"):
        plan_of(keep=keep)
    with pytest.raises(UserError, match=f"keep is {keep}"):
        check_keep(keep, 3, 12)


@pytest.mark.parametrize("groups", [1, 2, 5, 12])
@pytest.mark.parametrize("grouping", GROUPINGS.paper)
def test_any_number_of_groups(groups, grouping):
    """A student narrower or wider than the router's top-k of 3: as many experts wide as groups."""
    layers = teacher()
    rankings = [SCORINGS["gld_reap"](layer) for layer in layers]
    for keep in {groups, 12}:
        plan = make_plan(
            layers, rankings, grouping, "uniform", keep, scoring="gld_reap", groups=groups
        )
        for layer in plan.layers:
            assert len(layer.groups) == groups
            assert layer.width(7) == 7 * groups
            assert sum(len(group.experts) for group in layer.groups) == keep
            # The weights are renormalised, so that the groups carry 1 in all.
            assert sum(group.scale for group in layer.groups) == pytest.approx(1.0)


def test_groups_outside_their_bounds_are_refused():
    layers = teacher()
    rankings = [SCORINGS["gld_reap"](layer) for layer in layers]
    with pytest.raises(UserError, match=r"keep is 4; it must lie between 5 \(the groups\) and 12"):
        make_plan(layers, rankings, "RR", "uniform", 4, scoring="gld_reap", groups=5)
    with pytest.raises(UserError, match="groups is -1; it must be at least 1"):
        make_plan(layers, rankings, "RR", "uniform", 4, scoring="gld_reap", groups=-1)


def test_unknown_methods_are_refused():
    with pytest.raises(UserError, match="unknown grouping 'robin'; did you mean"):
        plan_of(grouping="robin")
    with pytest.raises(UserError, match="unknown scaling 'uniforms'; did you mean uniform"):
        plan_of(scaling="uniforms")
    with pytest.raises(UserError, match="unknown scoring"):
        make_plan([], [], "RR", "uniform", 3, scoring="best")


GROUP = ("layers", 0, "groups", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "plan: an object with .*format.* is expected"),
        (("format",), 2, "format 2; this version reads 1"),
        (("colour",), "red", "plan: unknown colour; known: format, grouping, keep"),
        (("scaling",), None, "plan: lacks scaling"),
        (("scoring",), 3, "scoring is 3; it must be a name"),
        (("grouping",), "", "grouping is ''"),
        (("keep",), 3, "layer 0: 4 experts in its groups, where keep is 3"),
        (("keep",), 5, "keep is 5; it must be a whole number from 1 to 4"),
        (("keep",), "4", "keep is '4'"),
        (("layers",), [], "at least one layer"),
        (("layers",), {}, "at least one layer"),
        (("layers", 1, "layer"), 0, "a layer is given twice"),
        (("layers", 1, "layer"), 3, r"for layers \[0, 3\]; the teacher's MoE layers are \[0, 2\]"),
        (("layers", 1, "layer"), -1, "layer is -1; it must be a whole number at least 0"),
        (("layers", 1, "layer"), True, "layer is True"),
        (("layers", 1, "width"), 8, "layer: unknown width"),
        (("layers", 0, "groups"), [], "layer 0: groups must be"),
        (("layers", 0, "groups", 0), 3, "layer 0: group: an object"),
        ((*GROUP, "experts"), [0, 4], "expert is 4; it must be a whole number from 0 to 3"),
        ((*GROUP, "experts"), [0, -1], "expert is -1"),
        ((*GROUP, "experts"), [0, 1.5], "expert is 1.5"),
        ((*GROUP, "experts"), [0, 1], "layer 0: an expert is in two groups"),
        ((*GROUP, "experts"), [2, 2], "twice in one"),
        ((*GROUP, "experts"), [], "experts must be a list of at least one"),
        ((*GROUP, "experts"), [0], "1 experts and not as many weights"),
        ((*GROUP, "weights"), [1.0], "2 experts and not as many weights"),
        ((*GROUP, "weights"), [0.75, 0.5], "weights sum to 1.25; they must sum to 1"),
        ((*GROUP, "weights"), [1.5, -0.5], "none negative"),
        ((*GROUP, "weights"), [float("nan"), 1], "must be numbers"),
        ((*GROUP, "weights"), ["0.5", 0.5], "must be numbers"),
        ((*GROUP, "weights"), [True, 0], "must be numbers"),
        ((*GROUP, "scale"), float("inf"), "scale is inf; it must be a finite number"),
        ((*GROUP, "scale"), "1", "scale is '1'"),
        ((*GROUP, "scale"), None, "layer 0: group: lacks scale"),
        ((*GROUP, "bias"), 1, "unknown bias; known: experts, neurons, scale, weights"),
        ((*GROUP, "neurons"), [], "neurons must be a list of at least one"),
        ((*GROUP, "neurons"), [0, 8], "neuron is 8; it must be a whole number from 0 to 7"),
        ((*GROUP, "neurons"), [1, 1], "lists a neuron twice"),
    ],
)
def test_a_bad_plan_is_refused(path, value, message):
    """Set (or, with None, delete) one entry of a good plan."""
    data = json.loads(json.dumps(by_hand().to_dict()))
    arguments = {"num_experts": 4, "expert_width": 8, "layers": [0, 2]}
    plan_from_dict(data, **arguments)
    if path:
        target = data
        for key in path[:-1]:
            target = target[key]
        if value is None:
            del target[path[-1]]
        else:
            target[path[-1]] = value
    else:
        data = value
    with pytest.raises(UserError, match=message) as caught:
        plan_from_dict(data, **arguments)
    assert "\n" not in str(caught.value)
