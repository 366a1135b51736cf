"""Groups of rows: all rows once, in as many groups of each transformer on every process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngrpo_train.models import grouping
from ngrpo_train.models.grouping import Group, grouped

CPU = torch.device("cpu")
rows_of_ranks = st.integers(1, 6).flatmap(
    lambda rows: st.lists(
        st.lists(st.tuples(st.sampled_from([1.0, 0.9, 0.5, 0.1]), st.integers(0, 1)), min_size=rows, max_size=rows),
        min_size=2,
        max_size=3,
    )
)


def test_one_process_groups_by_key_early_sigmas_first() -> None:
    keys = [(0.5, "a"), (0.9, "a"), (0.5, "a"), (0.5, "b")]
    assert grouped(keys, lambda sigma: True, CPU) == [Group((0, 2), 0.5), Group((1,), 0.9), Group((3,), 0.5)]
    assert grouped(keys, lambda sigma: sigma >= 0.875, CPU) == [Group((1,), 0.9), Group((0, 2), 0.5), Group((3,), 0.5)]


@pytest.mark.parametrize("boundary", [None, 0.875])
@given(ranks=rows_of_ranks)
def test_processes_make_as_many_forwards_of_each_transformer(
    boundary: float | None, ranks: list[list[tuple[float, int]]]
) -> None:
    counts = []

    def early(sigma: float) -> bool:
        return boundary is None or sigma >= boundary

    for keys in ranks:
        counts.append(torch.tensor([len({key for key in keys if early(key[0]) == which}) for which in (True, False)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping.processes, "world_size", lambda: len(ranks))
        patch.setattr(grouping.processes, "all_gather", lambda own: torch.stack(counts))
        made = [grouped(keys, early, CPU) for keys in ranks]
    orders = [[early(group.sigma) for group in groups] for groups in made]
    assert all(order == orders[0] for order in orders), "the same transformer at the same time"
    for keys, groups in zip(ranks, made, strict=True):
        counted = [number for group in groups if group.counts for number in group.numbers]
        assert sorted(counted) == list(range(len(keys))), "every row once"
        assert all(keys[number][0] == group.sigma for group in groups if group.counts for number in group.numbers)
        assert all(len({keys[number] for number in group.numbers}) == 1 for group in groups)
