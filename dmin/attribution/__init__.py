"""Attribution methods: stores in, scores and rankings out."""

from dmin.attribution.base import ExampleBlock, Method, Requires, Side
from dmin.attribution.dmin import DMin
from dmin.attribution.gradient_similarity import GradCos, GradDot
from dmin.attribution.pixel import PixelCosine, PixelL2
from dmin.attribution.random import Random
from dmin.attribution.ranking import Ranking
from dmin.attribution.retrieval import TopK, retrieve, score_matrix

__all__ = [
    "DMin",
    "ExampleBlock",
    "GradCos",
    "GradDot",
    "Method",
    "PixelCosine",
    "PixelL2",
    "Random",
    "Ranking",
    "Requires",
    "Side",
    "TopK",
    "retrieve",
    "score_matrix",
]
