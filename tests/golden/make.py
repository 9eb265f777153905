"""Make the golden artefacts anew: ``make.py [stores|bits|records|settings|demo]``.

They hold later code to what earlier code computed: make them anew only to add to them. Single
stores by name: ``make.py stores mlp``. ``make.py --compare-demo`` runs the demo (minutes) and says
whether its stores are those recorded, to the bit: which they can only be on the same kind of CPU.
"""

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for place in (Path(__file__).parents[1], Path(__file__).parents[2]):
    sys.path.insert(0, str(place))

import torch  # noqa: E402
from golden import definitions, settings  # noqa: E402

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "h5py")


def make_stores(names: list[str]) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    for name in names:
        golden = definitions.GOLDENS[name]
        target = definitions.STORES / name
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            by = definitions.collector(golden)
            train = definitions.make(golden, by, place / "train")
            asked = definitions.collect_queries(golden, by, place / "queries")
            expected = definitions.answer(golden, train, asked)
            expected["fingerprint"] = train.fingerprint
            expected["versions"] = {package: version(package) for package in PACKAGES}
            shutil.rmtree(target, ignore_errors=True)
            for store in ("train", "queries"):
                (target / store).mkdir(parents=True)
                for file in (place / store).iterdir():
                    # Made again where they are missing.
                    if file.is_file() and file.name != "catalog.kept":
                        shutil.copy(file, target / store / file.name)
        (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        print(name, sum(f.stat().st_size for f in target.rglob("*") if f.is_file()), flush=True)


def make_bits() -> None:
    """Add the digests that fresh collections have on a processor of this arithmetic."""
    torch.set_num_threads(1)
    digests = {}
    for name, golden in definitions.GOLDENS.items():
        by = definitions.collector(golden)
        with tempfile.TemporaryDirectory() as scratch:
            train = definitions.make(golden, by, Path(scratch) / "train")
            queries = definitions.collect_queries(golden, by, Path(scratch) / "queries")
            digests[name] = {"train": train.digest(), "queries": queries.digest()}
    known = json.loads(definitions.BITS.read_text())
    known[definitions.arithmetic()] = digests
    definitions.BITS.write_text(json.dumps(known, indent=1) + "\n")


def make_records() -> None:
    """Keep what ``dmin repeat`` needs of a run of each command."""
    shutil.rmtree(settings.RECORDS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch).resolve()
        for command, asked in settings.RUNS.items():
            status, printed = settings.dmin(command, *asked, place=place)
            assert status == 0, printed
            (run,) = (place / "outputs" / "runs" / command).iterdir()
            target = settings.RECORDS / command
            target.mkdir(parents=True)
            shutil.copy(run / "config.yaml", target)
            text = (run / "record.json").read_text()
            record = json.loads(text.replace(f"{place}/", "").replace(str(place), "."))
            record["machine"]["platform"] = platform.system()
            (target / "record.json").write_text(json.dumps(record, indent=1) + "\n")
            print(command, flush=True)


def make_settings() -> None:
    """Keep what each command composes, and the names of all settings and targets."""
    settings.CFG.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for command in settings.COMPOSED:
            for name, asked in settings.ASKED.items():
                text = settings.shown(command, asked, Path(scratch))
                (settings.CFG / f"{command}.{name}.yaml").write_text(text)
    plain = settings.composed("model", "ddpm")
    found = {
        "targets": settings.targets(),
        "plain": sorted(plain),
        "choices": {
            "/".join(choice): settings.names(*choice, set(plain)) for choice in settings.choices()
        },
    }
    settings.SETTINGS.write_text(json.dumps(found, indent=1) + "\n")


DEMOS = {
    "demo": ["demo", "extras.threads=1"],
    "fast": ["collect", "experiment=digits", "debug=fast", "extras.threads=1"],
}


def demo_digests(names: list[str]) -> dict[str, object]:
    """Run the demo, or a quick collection, in an empty folder; return what their stores hold."""
    found: dict[str, object] = {"cpu": cpu(), "threads": 1}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            asked, place = DEMOS[name], Path(scratch) / name
            place.mkdir()
            if name == "fast":
                _run(["train", *asked[1:]], place)
            _run(asked, place)
            found[name] = {
                "asked": asked,
                "stores": {
                    store.name.rpartition("-")[0]: definitions.Store(store).digest()
                    for store in sorted((place / "outputs" / "stores").iterdir())
                    if (store / "manifest.json").is_file()
                },
            }
    found["versions"] = {package: version(package) for package in PACKAGES}
    return found


def _run(asked: list[str], place: Path) -> None:
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-m", "dmin", *asked], cwd=place, check=True, env={**os.environ, **path}
    )


def cpu() -> dict[str, object]:
    """Return what bits can depend on."""
    return {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def compare_demo() -> int:
    """Say where the demo's stores are not those recorded."""
    then = json.loads(settings.DIGESTS.read_text())
    known = [name for name in DEMOS if name in then]
    now = demo_digests(known)
    for name in ("cpu", "threads", "versions", *known):
        print(name, "as recorded" if then[name] == now[name] else f"{now[name]}, not {then[name]}")
    return int(any(then[name] != now[name] for name in known))


if __name__ == "__main__":
    if "--compare-demo" in sys.argv:
        sys.exit(compare_demo())
    part, *only = sys.argv[1:] or ["all"]
    if part in ("stores", "all"):
        make_stores(only or list(definitions.GOLDENS))
    if part in ("bits", "all"):
        make_bits()
    if part in ("records", "all"):
        make_records()
    if part in ("settings", "all"):
        make_settings()
    if part in ("demo", "all"):
        known = json.loads(settings.DIGESTS.read_text()) if settings.DIGESTS.is_file() else {}
        found = {**known, **demo_digests(only if part == "demo" and only else list(DEMOS))}
        settings.DIGESTS.write_text(json.dumps(found, indent=1) + "\n")
