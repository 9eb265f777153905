"""Record the predicted image at every sampling step, by wrapping the scheduler's step."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dmin.runtime.errors import DminError


@contextmanager
def recorded(scheduler: Any, states: int) -> Iterator[list[Tensor]]:
    """Context that records a pipeline's estimates of the clean latents while it generates.

    An estimate is the scheduler's ``pred_original_sample`` if it exists; otherwise it is computed
    from the network's output at the noise level of the step.

    Args:
        scheduler: the pipeline's scheduler; it is restored on exit.
        states: number of recorded steps, evenly spaced, including the last.

    Yields:
        A list of the estimates, on the CPU, which the pipeline's call fills.

    Raises:
        DminError: there are fewer steps than states, or the scheduler does not give an estimate.
    """
    kept: list[Tensor] = []
    step, taken = scheduler.step, 0

    @functools.wraps(step)  # pipelines inspect its signature
    def watched(
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        return_dict: bool = True,
        **more: Any,
    ) -> Any:
        nonlocal taken
        found = step(output, timestep, sample, *args, return_dict=True, **more)
        total = len(scheduler.timesteps)
        if total < states:
            raise DminError(
                f"queries.trajectory={states}: this generation has {total} steps. Raise "
                "queries.steps."
            )
        if taken in {total - 1 - number * total // states for number in range(states)}:
            estimate = getattr(found, "pred_original_sample", None)
            if estimate is None:
                estimate = _estimate(scheduler, output, timestep, sample)
            kept.append(estimate.detach().cpu())
        taken += 1
        return found if return_dict else found.to_tuple()

    scheduler.step = watched
    try:
        yield kept
    finally:
        del scheduler.step


@contextmanager
def samplable(scheduler: Any) -> Iterator[None]:
    """Context in which a flow's scheduler works in pipelines written for diffusion.

    They need scales of the initial noise and of the network's input, which are 1 for flows.
    """
    lacking = [n for n in ("init_noise_sigma", "scale_model_input") if not hasattr(scheduler, n)]
    if lacking:
        scheduler.init_noise_sigma, scheduler.scale_model_input = 1.0, lambda x, *_, **__: x
    try:
        yield
    finally:
        for name in lacking:
            delattr(scheduler, name)


def _estimate(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """Return x0 of ``x = α x0 + σ ε`` from the network's output."""
    output, sample = output.float(), sample.float()
    if hasattr(scheduler, "precondition_outputs"):
        found: Tensor = scheduler.precondition_outputs(
            sample, output, scheduler.sigmas[scheduler.step_index - 1].to(sample)
        )
        return found
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    alpha, sigma = (x.to(sample) for x in _levels(scheduler, timestep, kind))
    if kind == "epsilon":
        return (sample - sigma * output) / alpha
    if kind == "v_prediction":
        return alpha * sample - sigma * output
    if kind == "sample":
        return output
    return sample - sigma * output  # a flow: α = 1 − σ, and the output is ε − x0


def _levels(scheduler: Any, timestep: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Return α and σ of the state before the latest step."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is not None and index is not None:
        sigma = sigmas[index - 1]
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            return scheduler._sigma_to_alpha_sigma_t(sigma)
        if kind == "flow_prediction":
            return 1 - sigma, sigma
    elif hasattr(scheduler, "alphas_cumprod") and kind != "flow_prediction":
        alpha = scheduler.alphas_cumprod[int(timestep)]
        return alpha.sqrt(), (1 - alpha).sqrt()
    raise DminError(
        f"{type(scheduler).__name__} does not report the predicted image at a step, which "
        f"queries.trajectory records. Set queries.trajectory=0, or use another scheduler in the "
        f"checkpoint, such as DDIMScheduler."
    )
