"""Make the golden artefacts anew: ``python tests/golden/make.py``.

They hold later code to what earlier code computed: make them anew only to add to them.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for place in (Path(__file__).parents[1], Path(__file__).parents[2]):
    sys.path.insert(0, str(place))

import torch  # noqa: E402
from golden import definitions  # noqa: E402

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
                    if file.is_file() and file.name != "catalog.npz":
                        shutil.copy(file, target / store / file.name)
        (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        print(name, sum(f.stat().st_size for f in target.rglob("*") if f.is_file()), flush=True)


if __name__ == "__main__":
    make_stores(sys.argv[1:] or list(definitions.GOLDENS))
