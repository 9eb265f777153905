"""Attribution methods: stores in, scores and rankings out."""

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.merge import merged
from dmin.attribution.method import Method
from dmin.attribution.methods.at_timesteps import AtTimesteps
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
from dmin.attribution.methods.pooled import Pool, Pooled
from dmin.attribution.methods.popularity import Popularity
from dmin.attribution.methods.sharp_energy import SharpEnergy
from dmin.attribution.methods.spectral import Spectral, ZSum
from dmin.attribution.methods.trak import TRAK, JourneyTRAK
from dmin.attribution.place_maps import Places, places
from dmin.attribution.ranking import Ranking
from dmin.attribution.ranking_files import save_ranking
from dmin.attribution.ranking_json import load_ranking, load_rankings
from dmin.attribution.retrieval import ranked_groups, retrieve, retrieve_part
from dmin.attribution.scores import score_matrix
from dmin.attribution.search.approximate import Approximate
from dmin.attribution.search.certified import Certified
from dmin.attribution.search.topk import TopK

# What goes in and comes out
__all__ = ["ExampleBlock", "FeatureSet", "Places", "Ranking", "load_ranking", "load_rankings"]
__all__ += ["merged", "places", "ranked_groups", "retrieve", "retrieve_part", "save_ranking"]
# Methods
__all__ += ["AtTimesteps", "Method", "Pool", "Pooled", "Requires", "score_matrix"]
__all__ += ["Blend", "DMin", "GradCos", "GradDot", "SharpEnergy", "Spectral", "ZSum"]
__all__ += ["DAS", "TRAK", "DataInf", "JourneyTRAK", "OverCheckpoints", "TRAKEnsemble"]
__all__ += ["CG", "EKFAC", "Arnoldi", "LiSSA", "Unlearning"]
__all__ += ["SSIM", "EncoderCosine", "GaussianKernel", "PixelCosine", "PixelL2"]
__all__ += ["Popularity", "Random", "TrainingLoss"]
# Ways to search
__all__ += ["Approximate", "Certified", "TopK"]
