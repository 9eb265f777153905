"""Noising processes, timesteps, and the noise that all examples share."""

from dmin.diffusion.noise import PerExampleNoise, SharedNoise
from dmin.diffusion.timesteps import DMinCubic, Explicit, LogSNR, Stratified

__all__ = ["DMinCubic", "Explicit", "LogSNR", "PerExampleNoise", "SharedNoise", "Stratified"]
