"""The moving average: by hand, in float32 whatever the weights are, and out of the way when it is not wanted."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes, sharding
from ngrpo_train.recipe.sections import Model, Parallel
from ngrpo_train.update.ema import EMA

CPU = torch.device("cpu")


def weights(dtype: torch.dtype, layout: str = "none") -> dict[str, nn.Parameter]:
    """The parameters of a module whose weights are all 1, plain or on a mesh of one."""
    module = nn.Linear(3, 2).to(dtype)
    sharding.shard(module, [], Model(), Parallel(sharding=layout, compute_dtype="float32"), CPU)
    fill(dict(module.named_parameters()), 1.0)
    return dict(module.named_parameters())


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], value: float) -> None:
    for parameter in parameters.values():
        processes.local(parameter).fill_(value)


def averages(ema: EMA) -> dict[str, Tensor]:
    return {name: processes.local(average) for name, average in ema.state_dict().items()}


@pytest.mark.parametrize("layout", ["none", "full"], ids=["plain", "mesh of one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_by_hand(dtype: torch.dtype, layout: str) -> None:
    """1, then twice towards 2 and once towards 0 by a quarter: 1.25, 1.4375, 1.078125."""
    parameters = weights(dtype, layout)
    ema = EMA(parameters, decay=0.75)
    for value, expected in ((2.0, 1.25), (2.0, 1.4375), (0.0, 1.078125)):
        fill(parameters, value)
        ema.update()
        found = averages(ema)
        assert found.keys() == parameters.keys() == {"weight", "bias"}
        for name, average in found.items():
            assert average.dtype == torch.float32
            assert torch.equal(average, torch.full(parameters[name].shape, expected))
    assert all((processes.local(p) == 0).all() for p in parameters.values()), "the weights themselves are left alone"


def test_steps_below_bfloat16s_last_digit_add_up() -> None:
    """From 1 towards 1.0078125, the next bfloat16, by a thousandth of the way: never half of it at once."""
    parameters = weights(torch.bfloat16)
    ema = EMA(parameters, decay=0.999)
    fill(parameters, 1.0078125)
    for _ in range(500):
        ema.update()
    expected = 1.0078125 - 0.0078125 * 0.999**500
    torch.testing.assert_close(averages(ema)["weight"], torch.full((2, 3), expected), rtol=1e-5, atol=0)
    ema.apply()
    assert torch.equal(parameters["weight"], torch.full((2, 3), expected).bfloat16())


@pytest.mark.parametrize("layout", ["none", "full"], ids=["plain", "mesh of one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_applied_gives_the_weights_back_to_the_bit(dtype: torch.dtype, layout: str, fails: bool) -> None:
    parameters = weights(dtype, layout)
    ema = EMA(parameters, decay=0.9)
    with torch.no_grad():
        for parameter in parameters.values():
            processes.local(parameter).copy_(torch.randn(parameter.shape).mul(1e-3))
    processes.local(parameters["bias"]).data[0] = float("nan")  # not even that may get lost
    kept = {name: processes.local(p).detach().clone() for name, p in parameters.items()}
    memory = {name: processes.local(p).data_ptr() for name, p in parameters.items()}
    ema.update()
    expected = {name: average.clone() for name, average in averages(ema).items()}
    try:
        with ema.applied():
            assert torch.equal(processes.local(parameters["weight"]), expected["weight"].to(dtype))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    for name, parameter in parameters.items():
        torch.testing.assert_close(processes.local(parameter), kept[name], rtol=0, atol=0, equal_nan=True)
        assert processes.local(parameter).data_ptr() == memory[name], "optimizer and modules hold these very tensors"
        assert parameter.requires_grad
    torch.testing.assert_close(averages(ema), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", ["never", "iteration"])
def test_a_model_computes_by_the_averages_while_they_are_applied(
    tiny_dev: str, load_flux: Callable[..., FlowModel], master: str, keep: str
) -> None:
    """Gathered copies of other weights do not survive on the way in or out."""
    flux = load_flux(tiny_dev, compute_dtype="bfloat16", master_dtype=master, sharding="full", keep_gathered=keep)
    parameters = flux.trainable  # the shards: while weights are gathered, it has those
    ema = EMA(parameters, decay=0.5)
    conditioning, x, sigma = flux.encode(["a dog"]), torch.randn(1, 4, 64), torch.full((1,), 0.6)

    @torch.no_grad()
    def velocity() -> Tensor:
        return flux.velocity(x, sigma, conditioning)

    before = velocity()
    with flux.gathered("iteration"), torch.no_grad():
        velocity()
        for parameter in parameters.values():
            processes.local(parameter).mul_(2)
        sharding.release(flux.transformer)
        after = velocity()
    ema.update()
    with ema.applied():
        averaged = velocity()
    assert torch.equal(velocity(), after)
    assert len({v.double().norm().item() for v in (before, after, averaged)}) == 3
    with torch.no_grad():
        for parameter in parameters.values():
            processes.local(parameter).mul_(0.75)  # of twice the first weights: halfway
    sharding.release(flux.transformer)
    assert torch.equal(velocity(), averaged)
