"""Plans: does a recipe fit a GPU, and what does an iteration cost there? No GPU is needed; `ngrpo plan` shows it.

`activations` and `elementwise` measure what the model keeps and moves, on "meta"; `layout` cuts an iteration into
pieces; `flops`, `traffic` and `memory` count what it computes, sends and holds; `seconds` estimates its time, at the
rates that `rates` assumes; `forecast` settles what a recipe leaves open and makes a `Plan`; `remedies` proposes
changes, `scaling` takes more GPUs, and `report` prints all this.
"""

from ngrpo_train.plan.flops import Flops, iteration_flops
from ngrpo_train.plan.forecast import Plan, Settled, fastest_that_fits, make_plan
from ngrpo_train.plan.remedies import Remedy, explain_out_of_memory, remedies, speedups
from ngrpo_train.plan.report import plan_command, print_plan

__all__ = [
    "Flops",
    "Plan",
    "Remedy",
    "Settled",
    "explain_out_of_memory",
    "fastest_that_fits",
    "iteration_flops",
    "make_plan",
    "plan_command",
    "print_plan",
    "remedies",
    "speedups",
]
