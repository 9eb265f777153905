"""Attribution methods: stores in, scores and rankings out."""

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.merge import merged
from dmin.attribution.method import Method
from dmin.attribution.methods.blend import Blend
from dmin.attribution.methods.checkpoints import (
    GAS,
    DTRAKEnsemble,
    OverCheckpoints,
    TracIn,
    TRAKEnsemble,
)
from dmin.attribution.methods.das import DAS
from dmin.attribution.methods.datainf import DataInf
from dmin.attribution.methods.dmin import DMin
from dmin.attribution.methods.ekfac import EKFAC, Unlearning
from dmin.attribution.methods.encoder import EncoderCosine
from dmin.attribution.methods.gradient_similarity import DMinUnnormalised, GradCos, GradDot
from dmin.attribution.methods.inverse_hessian import CG, Arnoldi, LiSSA
from dmin.attribution.methods.likeness import SSIM, GaussianKernel
from dmin.attribution.methods.pixel import PixelCosine, PixelL2
from dmin.attribution.methods.popularity import Popularity, TrainingLoss
from dmin.attribution.methods.random import Random
from dmin.attribution.methods.sharp_energy import SharpEnergy
from dmin.attribution.methods.spectral import Spectral, SpectralEnergy, ZSum
from dmin.attribution.methods.trak import DTRAK, TRAK, JourneyTRAK, RelativeIF, RenormalisedIF
from dmin.attribution.ranking import Ranking
from dmin.attribution.retrieval import ranked_groups, retrieve, retrieve_part
from dmin.attribution.scores import score_matrix
from dmin.attribution.search.approximate import Approximate
from dmin.attribution.search.index import Certified
from dmin.attribution.search.topk import TopK

__all__ = [
    "CG",
    "DAS",
    "DTRAK",
    "EKFAC",
    "GAS",
    "SSIM",
    "TRAK",
    "Approximate",
    "Arnoldi",
    "Blend",
    "Certified",
    "DMin",
    "DMinUnnormalised",
    "DTRAKEnsemble",
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
    "RelativeIF",
    "RenormalisedIF",
    "Requires",
    "SharpEnergy",
    "Spectral",
    "SpectralEnergy",
    "TRAKEnsemble",
    "TopK",
    "TracIn",
    "TrainingLoss",
    "Unlearning",
    "ZSum",
    "merged",
    "ranked_groups",
    "retrieve",
    "retrieve_part",
    "score_matrix",
]
