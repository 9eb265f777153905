"""Attribution methods: stores in, scores and rankings out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.merge import merged
from dmin.attribution.method import Method
from dmin.attribution.methods.baselines import Random, TrainingLoss
from dmin.attribution.methods.combination import Blend
from dmin.attribution.methods.das import DAS
from dmin.attribution.methods.datainf import DataInf
from dmin.attribution.methods.dmin import DMin
from dmin.attribution.methods.ekfac import EKFAC, Unlearning
from dmin.attribution.methods.encoder import EncoderCosine
from dmin.attribution.methods.gradient_similarity import GradCos, GradDot
from dmin.attribution.methods.images import SSIM, GaussianKernel, PixelCosine, PixelL2
from dmin.attribution.methods.influence_functions import CG, Arnoldi, LiSSA
from dmin.attribution.methods.over_checkpoints import OverCheckpoints, TRAKEnsemble
from dmin.attribution.methods.popularity import Popularity
from dmin.attribution.methods.sharp_energy import SharpEnergy
from dmin.attribution.methods.spectral import Spectral, ZSum
from dmin.attribution.methods.trak import TRAK, JourneyTRAK
from dmin.attribution.ranking import Ranking
from dmin.attribution.ranking_files import load_ranking, save_ranking
from dmin.attribution.retrieval import ranked_groups, retrieve, retrieve_part
from dmin.attribution.scores import score_matrix
from dmin.attribution.search.approximate import Approximate
from dmin.attribution.search.certified import Certified
from dmin.attribution.search.topk import TopK

__all__ = [
    "CG",
    "DAS",
    "EKFAC",
    "SSIM",
    "TRAK",
    "Approximate",
    "Arnoldi",
    "Blend",
    "Certified",
    "DMin",
    "DataInf",
    "EncoderCosine",
    "ExampleBlock",
    "FeatureSet",
    "GaussianKernel",
    "GradCos",
    "GradDot",
    "JourneyTRAK",
    "LiSSA",
    "Method",
    "OverCheckpoints",
    "PixelCosine",
    "PixelL2",
    "Popularity",
    "Random",
    "Ranking",
    "Requires",
    "SharpEnergy",
    "Spectral",
    "TRAKEnsemble",
    "TopK",
    "TrainingLoss",
    "Unlearning",
    "ZSum",
    "load_ranking",
    "merged",
    "ranked_groups",
    "retrieve",
    "retrieve_part",
    "save_ranking",
    "score_matrix",
]


def _spectral_energy(
    alpha: float | None = 1.0,
    p: float = 1.0,
    weights: Any = None,
    rank: int | None = None,
    memory: int = 1 << 30,
    passes: int = 2,
    effective: float | None = None,
) -> SharpEnergy:
    return SharpEnergy(
        alpha, p, weights, 0.0, 1.0, rank, memory, passes, effective, "spectral_energy"
    )


# Classes of 0.1.0 that are settings of another today, as `conf/method` has them.
_OLD: dict[str, Callable[..., Method]] = {
    "DMinUnnormalised": partial(DMin, lengths=True),
    "DTRAK": partial(TRAK, readout="mean_squared_output", name="d_trak"),
    "DTRAKEnsemble": partial(TRAKEnsemble, readout="mean_squared_output", name="d_trak_ensemble"),
    "GAS": partial(OverCheckpoints, GradCos(), name="gas"),
    "RelativeIF": partial(TRAK, divisor="change", name="relative_if"),
    "RenormalisedIF": partial(TRAK, divisor="length", name="renormalised_if"),
    "SpectralEnergy": _spectral_energy,
    "TracIn": partial(OverCheckpoints, GradDot(), name="tracin"),
}


def __getattr__(name: str) -> Callable[..., Method]:
    """Return what makes a method by its name in 0.1.0."""
    if name in _OLD:
        return _OLD[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
