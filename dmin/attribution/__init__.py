"""Attribution methods: stores in, scores and rankings out."""

from dmin.attribution.base import ExampleBlock, Method, Requires, Side
from dmin.attribution.blend import Blend
from dmin.attribution.checkpoints import GAS, DTRAKEnsemble, OverCheckpoints, TracIn, TRAKEnsemble
from dmin.attribution.das import DAS
from dmin.attribution.datainf import DataInf
from dmin.attribution.dmin import DMin
from dmin.attribution.ekfac import EKFAC, Unlearning
from dmin.attribution.encoder import EncoderCosine
from dmin.attribution.gradient_similarity import DMinUnnormalised, GradCos, GradDot
from dmin.attribution.inverse_hessian import CG, Arnoldi, LiSSA
from dmin.attribution.likeness import SSIM, GaussianKernel
from dmin.attribution.merge import merged
from dmin.attribution.pixel import PixelCosine, PixelL2
from dmin.attribution.popularity import Popularity, TrainingLoss
from dmin.attribution.random import Random
from dmin.attribution.ranking import Ranking
from dmin.attribution.retrieval import ranked_groups, retrieve, retrieve_part
from dmin.attribution.scores import score_matrix
from dmin.attribution.search import Certified
from dmin.attribution.search_faiss import Approximate
from dmin.attribution.search_topk import TopK
from dmin.attribution.sharp_energy import SharpEnergy
from dmin.attribution.spectral import Spectral, SpectralEnergy, ZSum
from dmin.attribution.trak import DTRAK, TRAK, JourneyTRAK, RelativeIF, RenormalisedIF

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
    "Side",
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
