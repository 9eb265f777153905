"""``dmin doctor``: is the model measured rightly, and what will collecting take?"""

from typing import Any

from dmin.cli.commands.command import Command
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError


@Command
def doctor(work: Workspace, results: dict[str, Any]) -> None:
    """Examine the model on a few examples, and say what collecting would take."""
    from dmin.doctor import diagnose

    work.require_one_process()
    settings = work.cfg.collect
    data = work.data  # first, as it is read sooner than the model
    found = diagnose(
        work.collector,
        data,
        work.cfg.doctor.examples,
        work.trainer(),
        settings.dtype,
        settings.block_size,
    )
    file = work.run_folder / "diagnosis.json"
    found.save(file)
    results["checks"] = {check.name: check.verdict for check in found.checks}
    results["figures"] = {"checks": str(len(found.checks)), "failed": str(len(found.failed))}
    for table in found.tables():
        work.console.print(table)
    if not found.passed:
        raise DminError(
            f"{len(found.failed)} of {len(found.checks)} checks failed: "
            f"{', '.join(check.name for check in found.failed)}. What to do stands beside each "
            f"above and in {file}."
        )
    work.console.print(f"Nothing failed. All of it is in\n  {file}", soft_wrap=True)
