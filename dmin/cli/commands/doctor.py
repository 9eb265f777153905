"""``dmin doctor``: are the gradients of the model right, and what will collecting cost?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dmin.cli.commands.command import Command
from dmin.cli.workspace.built import build
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError

if TYPE_CHECKING:
    from dmin.doctor.size import Size


@Command
def doctor(work: Workspace, results: dict[str, Any]) -> None:
    """Examine the model on a few examples, and predict the cost of collecting."""
    from dmin.doctor import diagnose

    work.require_one_process()
    settings = work.cfg.collect
    data = work.data  # first, because it opens faster than the model
    size = predicted_size(work)
    found = diagnose(
        work.collector,
        data,
        work.cfg.doctor.examples,
        work.trainer(),
        settings.dtype,
        settings.block_size,
    )
    found = replace(found, size=size)
    file = work.run_folder / "diagnosis.json"
    found.save(file)
    results["checks"] = {check.name: check.verdict for check in found.checks}
    results["figures"] = {"checks": str(len(found.checks)), "failed": str(len(found.failed))}
    for table in found.tables():
        work.console.print(table)
    if not found.passed:
        raise DminError(
            f"{len(found.failed)} of {len(found.checks)} checks failed: "
            f"{', '.join(check.name for check in found.failed)}. The remedies are listed above "
            f"and in {file}."
        )
    work.console.print(f"No check failed. The full report is in\n  {file}", soft_wrap=True)


def predicted_size(work: Workspace) -> Size | None:
    """Predict the model's memory before weights are read; None if unknown."""
    from dmin.doctor.size import predict_size
    from dmin.models.checkpoints import without_weights

    work.require_conditions(work.data)
    try:
        with without_weights():
            model = build(work.cfg.model)
        network = model.network
        if not any(p.is_meta for p in network.parameters()):  # the user's own, already in memory
            return None
        collector = work.collector_of(model)
        device = work.trainer().strategy.root_device
        size = predict_size(collector, work.data[0], len(work.data), device)
    except Exception as error:  # the examination goes on, and reports what is wrong itself
        if isinstance(error.__cause__, DminError):  # a wrong setting of the model
            raise
        work.notes.print(f"memory and time are not predicted from the configs: {error}")
        return None
    checkpointing = getattr(network, "_supports_gradient_checkpointing", False)
    remedies = size.remedies(next(network.parameters()).dtype, checkpointing)
    work.console.print(size.table(remedies))
    return size
