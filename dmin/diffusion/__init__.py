"""What is differentiated where: noising processes, timesteps, and the noise that all share."""

from dmin.diffusion.noise import PerExampleNoise, SharedNoise
from dmin.diffusion.timesteps import DMinCubic, Explicit, LogSNR, Stratified

__all__ = ["DMinCubic", "Explicit", "LogSNR", "PerExampleNoise", "SharedNoise", "Stratified"]
