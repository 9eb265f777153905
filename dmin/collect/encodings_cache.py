"""Encodings on disk: every latent and prompt embedding is computed once, before any gradient.

Image and text encoders can outweigh the network whose gradients are wanted. They run first, over
all examples, and leave the device; gradients are then computed from the cached encodings.
"""

import hashlib
import re
import shutil
from collections.abc import Container, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dmin.diffusion.inputs import SHARED
from dmin.models.base import Condition
from dmin.runtime.errors import DminError
from dmin.runtime.files import commit, naming
from dmin.runtime.transfer import to_device

Encoded = tuple[Tensor, Condition]
"""What ``model.encode`` returns: x0 and condition of examples of one shape."""

_NAME = re.compile(r"block-(\d{8,})-([0-9a-f]{16})\.safetensors")


class EncodingsCache:
    """A folder with one file for each encoded block, named after its own bytes.

    Files appear whole or not at all, so a killed run goes on where it was.

    Args:
        root: folder of all encodings; may be shared by several stores.
        key: fingerprint of encoders, dataset and block size, the name of the folder below it.
        block_size: examples per block.
    """

    def __init__(self, root: str | Path, key: str, block_size: int) -> None:
        self.folder: Path = Path(root) / key
        self.block_size = block_size

    def missing(self, blocks: Sequence[int]) -> list[int]:
        """Return the blocks that are not cached."""
        there = self._files()
        return [block for block in blocks if block not in there]

    def save(self, block: int, encoded: Sequence[Encoded]) -> None:
        """Save the encodings of one block.

        Args:
            block: its number.
            encoded: of the examples of each shape.

        Raises:
            DminError: the folder cannot be written.
        """
        named = {}
        for group, (x0, condition) in enumerate(encoded):
            named[f"{group:03d}.x0"] = x0
            named.update({f"{group:03d}.condition.{k}": v for k, v in condition.items()})
        # Copies: safetensors takes no views of one another.
        tensors = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in named.items()
        }
        content = save(tensors)
        path = self.folder / f"block-{block:08d}-{_digest(content)}.safetensors"
        with naming("keep encodings in", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            commit(path, content)

    def load(self, block: int, device: torch.device) -> list[Encoded]:
        """Return the saved encodings of one block.

        Raises:
            DminError: the file is missing or damaged.
        """
        path = self._files().get(block, self.folder)
        try:
            content = path.read_bytes()
            tensors = load(content)
        except (OSError, SafetensorError) as error:
            raise self._lost(block, path) from error
        if not path.stem.endswith(_digest(content)):
            raise self._lost(block, path)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in sorted(tensors.items()):
            group, _, part = name.partition(".")
            groups.setdefault(group, {})[part.removeprefix("condition.")] = to_device(value, device)
        return [(named.pop("x0"), named) for named in groups.values()]

    def of_rows(self, rows: Sequence[int], examples: int) -> Encoded | None:
        """Return the encodings of chosen examples, on the CPU.

        Args:
            rows: their places in the dataset.
            examples: in all.

        Returns:
            None if a block of theirs is missing, or has several shapes.
        """
        blocks: dict[int, Encoded] = {}
        wanted = sorted({row // self.block_size for row in rows})
        if self.missing(wanted):
            return None
        for block in wanted:
            groups = self.load(block, torch.device("cpu"))
            draws, part = divmod(
                len(groups[0][0]), min(self.block_size, examples - block * self.block_size)
            )
            if len(groups) != 1 or part:
                return None
            blocks[block] = groups[0]
        parts = [
            (blocks[row // self.block_size], slice(first, first + draws))
            for row in rows
            for first in [row % self.block_size * draws]
        ]
        x0 = torch.cat([encoded[0][place] for encoded, place in parts])
        first = blocks[wanted[0]][1]
        return x0, {
            n: value if n.startswith(SHARED) else torch.cat([e[1][n][place] for e, place in parts])
            for n, value in first.items()
        }

    def remove(self, blocks: Container[int] | None = None) -> None:
        """Delete the encodings, or those of some blocks, and the root folder if it is empty."""
        if blocks is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        for block, path in self._files().items():
            if blocks is not None and block in blocks:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
        with suppress(OSError):
            self.folder.parent.rmdir()

    def _files(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return {int(match[1]): path for match, path in found if match}

    def _lost(self, block: int, path: Path) -> DminError:
        return DminError(
            f"the encodings of block {block} cannot be read from {path}, which was damaged or "
            f"removed after it was written. Delete the file if it exists and run the same "
            f"command again: only this block is encoded again."
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
