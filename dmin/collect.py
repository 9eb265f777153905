"""From examples to a store of sketched gradients: a Lightning predict loop over fixed blocks."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from dmin.capture import Capture, choose_parameters
from dmin.data.base import Dataset, describe_dataset
from dmin.data.module import CollectData
from dmin.errors import DminError
from dmin.fingerprint import fingerprint
from dmin.models.base import READOUTS, Condition, DiffusionModel
from dmin.noise import SharedNoise
from dmin.sketches import BlockCyclic, Sketch
from dmin.store import Layout, Manifest, Rows, Store, StoreWriter
from dmin.timesteps import Schedule, Stratified

# Raised whenever the numbers that land in a store change for unchanged settings.
FEATURE_SCHEMA = 1


class Features(NamedTuple):
    """The features of a block of examples; axes as in the store."""

    values: dict[str, Tensor]  # readout -> [rows, draw, timestep, group, dim], unit gradients
    norms: dict[str, Tensor]  # readout -> [rows, draw, timestep, group]
    losses: Tensor  # [rows, draw, timestep]


class GradientCollector(lightning.LightningModule):
    """Turns examples into sketches of their per-timestep loss gradients.

    A row is ``S g_t / ‖g_t‖`` with ``g_t = ∇_θ L(θ; x, ε_t, t)`` over all attributed parameters
    (DMin, arXiv 2412.08637), for each readout, noise draw and timestep.

    Args:
        model: the diffusion model. It is not changed.
        sketch: the random linear map S.
        timesteps: where gradients are taken.
        noise: shared by all examples and queries.
        readouts: what is differentiated, names from ``dmin.models.READOUTS``; each costs one more
            backward pass.
        params: which parameters are attributed: ``all`` or a regular expression of their names.
        microbatch: pairs of example and timestep in one forward pass; more is faster until memory
            ends. Results agree to rounding whatever it is.
        budget: bytes that per-example gradients may take at once; None chooses by device.

    Raises:
        DminError: unknown readout, no such parameters, or a layer that cannot be differentiated.
    """

    def __init__(
        self,
        model: DiffusionModel,
        sketch: Sketch | None = None,
        timesteps: Schedule | None = None,
        noise: SharedNoise | None = None,
        readouts: Sequence[str] = ("loss",),
        params: str = "all",
        microbatch: int = 64,
        budget: int | None = None,
    ) -> None:
        super().__init__()
        unknown = [name for name in readouts if name not in READOUTS]
        if unknown or not readouts:
            raise DminError(
                f"readouts={list(readouts)}: name one or more of {', '.join(READOUTS)}."
            )
        if microbatch < 1:
            raise DminError(f"microbatch={microbatch}: at least one pair a pass is needed.")
        self.model = model
        self.attributed = choose_parameters(model.network, params)
        self.sketch = (sketch or BlockCyclic()).bind(self.attributed)
        self.timesteps = (timesteps or Stratified())(model.ladder)
        self.noise = noise or SharedNoise()
        self.readouts = tuple(readouts)
        self.microbatch = microbatch
        self.budget = budget

    def collect(
        self,
        dataset: Dataset,
        path: str | Path,
        *,
        block_size: int = 32,
        dtype: str = "float16",
        segment_bytes: int = 64 << 20,
        seal_seconds: float = 60.0,
        workers: int = 0,
        trainer: lightning.Trainer | None = None,
    ) -> Store:
        """Collect the features of a dataset into a store, or the rest of them if some are there.

        The work is cut into blocks of consecutive examples. A killed run loses the blocks that were
        not sealed yet; the same call computes exactly what is missing, to the same bits on a CPU.

        Args:
            dataset: examples with stable ids.
            path: the store's folder; made, or resumed if its manifest is the same.
            block_size: examples a block.
            dtype: of the stored rows, ``float16`` or ``float32``.
            segment_bytes: rows are sealed into a file when they take this many bytes …
            seal_seconds: … or when this much time has passed: the most that a kill can cost.
            workers: processes that load examples.
            trainer: any Lightning trainer; :func:`predict_trainer` if none.

        Returns:
            The complete store, verified.

        Raises:
            DminError: bad data, a NaN gradient, or a store of something else at that path.
        """
        manifest = self.manifest(dataset, block_size, dtype)
        with StoreWriter(
            path, manifest, segment_bytes=segment_bytes, seal_seconds=seal_seconds
        ) as writer:
            pending = writer.pending()
            if pending:
                data = CollectData(dataset, pending, block_size, workers)
                _predict(self, data, writer, trainer or predict_trainer())
        store = Store(path)
        store.require_complete()
        return store

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> tuple[int, Rows]:
        """Return the store rows of one block, with its first position in the dataset."""
        if torch.is_inference_mode_enabled():
            raise DminError(
                "trainer.inference_mode is on, which forbids gradients. Set "
                "trainer.inference_mode=false (Trainer(inference_mode=False))."
            )
        with torch.no_grad():
            x0, condition = self.model.encode(batch)
        features = self.features(x0, condition, batch["id"])
        numpy = {name: values.cpu().numpy() for name, values in features.values.items()}
        norms = {name: values.cpu().numpy() for name, values in features.norms.items()}
        losses = features.losses.cpu().numpy()
        rows = Rows(batch["id"], batch["metadata"], numpy, norms, losses)
        return batch["position"][0], rows

    def features(self, x0: Tensor, condition: Condition, ids: Sequence[str]) -> Features:
        """Return the features of encoded examples.

        Args:
            x0: ``[rows, ...]`` from ``model.encode``.
            condition: from ``model.encode``.
            ids: names of the examples, for messages.

        Raises:
            DminError: a gradient is NaN or infinite; the example and timestep are named.
        """
        draws, steps = self.noise.draws, len(self.timesteps)
        keyed = [self.noise(x0.shape[1:], t, draw) for draw in range(draws) for t in self.timesteps]
        noise = torch.stack(keyed).to(x0)
        t = torch.tensor(self.timesteps * draws, device=x0.device)
        # Every pair (example, draw and timestep) in the order of the store's axes.
        example = torch.arange(len(x0), device=x0.device).repeat_interleave(draws * steps)
        keyed_at = torch.arange(draws * steps, device=x0.device).repeat(len(x0))
        parts = [
            self._microbatch(x0[i], noise[j], t[j], {k: v[i] for k, v in condition.items()})
            for i, j in zip(
                example.split(self.microbatch), keyed_at.split(self.microbatch), strict=True
            )
        ]
        shape = (len(x0), draws, steps)
        losses = torch.cat([part.losses for part in parts]).view(shape)
        values = {
            name: torch.cat([part.values[name] for part in parts]).unflatten(0, shape)
            for name in self.readouts
        }
        norms = {
            name: torch.cat([part.norms[name] for part in parts]).unflatten(0, shape)
            for name in self.readouts
        }
        for name in self.readouts:
            self._check_finite(name, norms[name], ids)
        return Features(values, norms, losses)

    def _microbatch(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Features:
        """One forward pass and one backward pass a readout; leading axis: pairs."""
        values, norms = {}, {}
        with (
            torch.enable_grad(),
            Capture(self.model.network, self.sketch, self.budget) as capture,
        ):
            prediction = self.model.predict(x0, noise, t, condition)
            for name in self.readouts:
                last = name == self.readouts[-1]
                rows = capture.backward(READOUTS[name](prediction), keep_graph=not last)
                norm = rows.squared_norm.sum(1).sqrt()
                # A gradient of exactly zero (a saturated loss) stays a row of zeros.
                scale = torch.where(norm > 0, norm, 1)[:, None, None]
                values[name] = rows.values / scale
                norms[name] = rows.squared_norm.sqrt()
            losses = READOUTS["loss"](prediction).detach()
        return Features(values, norms, losses)

    def _check_finite(self, readout: str, norms: Tensor, ids: Sequence[str]) -> None:
        bad = (~torch.isfinite(norms)).nonzero()
        if len(bad):
            row, _, step, _ = bad[0].tolist()
            raise DminError(
                f"the gradient of {readout} for example {ids[row]!r} at timestep "
                f"{self.timesteps[step]:g} is NaN or infinite ({len(bad)} such in this block). "
                f"Look at that image and at the checkpoint's weights; in low precision, try "
                f"trainer.precision=32-true. Blocks finished before this one are kept."
            )

    def describe(self) -> dict[str, Any]:
        """Return everything that must match between a training and a query store, as JSON."""
        entries = [list(entry) for entry in self.attributed.entries]
        return {
            "schema": FEATURE_SCHEMA,
            "weights": _weights_digest(self.model.network),
            "parameters": {
                "count": self.attributed.count,
                "names": fingerprint({"entries": entries}),
            },
            "loss": self.model.describe(),
            "noise": self.noise.describe(),
            "sketch": self.sketch.describe(),
        }

    def manifest(self, dataset: Dataset, block_size: int = 32, dtype: str = "float16") -> Manifest:
        """Return the manifest of this collector's store of a dataset."""
        layout = Layout(
            readouts=self.readouts,
            draws=self.noise.draws,
            timesteps=self.timesteps,
            groups=self.attributed.groups,
            dim=self.sketch.dim,
            dtype=dtype,
        )
        described = describe_dataset(dataset)
        return Manifest(layout, self.describe(), described, len(dataset), block_size)


class SketchWriter(BasePredictionWriter):
    """Hands each block's rows to the store; whatever ends the loop, finished blocks are sealed.

    Args:
        writer: the store's writer, one a process.
    """

    def __init__(self, writer: StoreWriter) -> None:
        super().__init__("batch")
        self.writer = writer

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: tuple[int, Rows],
        *_: Any,
    ) -> None:
        """Append one block."""
        position, rows = prediction
        self.writer.append(position // self.writer.manifest.block_size, rows)

    def on_predict_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Seal the last blocks, then wait for the other processes to have sealed theirs."""
        self.writer.close()
        trainer.strategy.barrier("dmin: every process has sealed its blocks")

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Seal what is finished before the exception ends the process."""
        self.writer.close()


def predict_trainer(**settings: Any) -> lightning.Trainer:
    """Return a Lightning trainer fit for collecting: no inference mode, logger or checkpoints.

    Args:
        settings: anything ``lightning.Trainer`` takes; wins over these defaults.
    """
    fit = {
        "accelerator": "auto",
        "devices": 1,
        "inference_mode": False,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**{**fit, **settings})


def _predict(
    collector: GradientCollector,
    data: CollectData,
    writer: StoreWriter,
    trainer: lightning.Trainer,
) -> None:
    sink, device = SketchWriter(writer), next(collector.model.parameters()).device
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.append(sink)
    try:
        with warnings.catch_warnings():
            # `workers` was chosen, and blocks are all there is: neither warning tells news.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*custom batch sampler.*")
            trainer.predict(collector, datamodule=data, return_predictions=False)
    finally:
        callbacks.remove(sink)
        collector.model.to(device)
    if trainer.interrupted:
        raise KeyboardInterrupt


def _weights_digest(network: torch.nn.Module) -> str:
    """Return a digest of every weight and buffer of a network, whatever device it is on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
