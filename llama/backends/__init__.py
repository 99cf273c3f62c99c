"""How a matrix, or a whole step, is computed: one file a backend, and one plan that chooses."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llama.backends import native, onednn
from llama.model import StepBackend, Transformer
from llama.parallel import Joined


@dataclass(frozen=True)
class Plan:
    """What computes a model here.

    linear: makes the callable of one linear, x (…, in) to (…, out), of its name and weight (out, in); None
    for PyTorch's own. least_rows: that such a linear is worth giving. step: takes over the loaded model's
    weights and computes whole steps; None where `linear` serves. missing: why there is no whole step.
    """

    linear: Callable[[str, Tensor], Callable[[Tensor], Tensor]] | None = None
    least_rows: int = 1
    step: Callable[[Transformer], StepBackend] | None = None
    missing: str = ""


def plan(
    model: Transformer, *, whole_steps: bool = True, mapped: bool = False, threads: int | None = None
) -> Plan:
    """The fastest way to compute a loaded model of plain weights, which it leaves as it is.

    whole_steps: whether one call may replace the model's layers, which compilers cannot look into.
    mapped: leave the weights in the files that they are mapped from. threads: of a whole step; by default
    as many as PyTorch uses.
    """
    missing = ""
    if whole_steps:
        try:
            native.check(model)
            return Plan(step=lambda model: native.native_step(model, threads, in_place=mapped))
        except native.UnavailableError as error:
            missing = str(error)
    if not mapped and onednn.can_pack(model.output.weight):
        # oneDNN 3.12 takes 1.3 times as long for one to three rows as for four.
        return Plan(lambda _, weight: onednn.Packed(weight), least_rows=4, missing=missing)
    return Plan(missing=missing)


def apply(plan: Plan, model: Transformer) -> None:
    """Carry out a plan. Where it brings callables, the model's plain weights are gone afterwards."""
    model.least_rows = plan.least_rows
    if plan.step:
        model.step_backend = plan.step(model)
    elif plan.linear:
        onednn.replace_weights(model, plan.linear)
    elif model.device.type not in ("cpu", "meta"):
        for module in model.modules():  # whatever reads the same input, as one matrix
            if isinstance(module, Joined):
                module.join()
