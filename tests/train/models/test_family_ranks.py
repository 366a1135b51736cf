"""Every family of flow models on two processes, sharded by FSDP2, as one process trains it: f in docs/models.md."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from ..runs import Run, figures, norm, observed, on_ranks, saved
from .family_case import FAMILIES, Case, families_in_full, make_cases
from .test_family_runs import ITERATIONS, NEIGHBOR, run

TWO = {"prompts.per-rank": "1", "parallel.sharding": "full"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, tuple[Path, Path]]:
    """For each family that is asked for, the directories of a run on one process and of the same on two."""
    case = make_cases(tmp_path_factory.mktemp("families"))
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    asked = [item.callspec.params["family"] for item in items]
    here = [name for name in asked if all(map(find_spec, FAMILIES[name].requires))]
    alone = {family: _run(case(family), f"{family}_alone") for family in here}
    together = {family: _run(case(family), f"{family}_together", **TWO) for family in here}
    assert all(each.make() == 0 for each in alone.values())
    on_ranks(2, list(together.values()))
    return {family: (alone[family].directory, together[family].directory) for family in here}


def _run(case: Case, name: str, **changes: str) -> Run:
    return run(case, name, {**NEIGHBOR, "log.export": "False"}, **changes)


@families_in_full
def test_two_processes_train_as_one_does(trained: dict[str, tuple[Path, Path]], family: str) -> None:
    """The gradient of the first iteration is that of one process, and later rollouts see the weights of their time.

    Groups of such random models differ in their rewards by little more than bytes of pictures, and another batch rounds
    a byte otherwise here and there. The gradient is linear in the advantages, whose difference it may have.
    """
    if family not in trained:
        pytest.skip(f"transformers loads its processor with {', '.join(FAMILIES[family].requires)} alone")
    alone, together = trained[family]
    mine, theirs = saved(alone, 1), saved(together, 1)
    names = [name for name in mine if name.endswith(".exp_avg")]  # a tenth of the gradient
    assert names
    wanted, got = (observed(run)["advantages"][0] for run in (alone, together))
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    allowed = 2e-5 + 3 * float((got - wanted).norm() / wanted.norm())
    assert norm(theirs[n] - mine[n] for n in names) < allowed * norm(mine[n] for n in names)
    rows = figures(together)
    assert len(rows) == ITERATIONS
    assert all(row["policy/rollout_mismatch"] < 1e-4 for row in rows), "an update's velocity is its rollout's"
