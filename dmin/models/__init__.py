"""Diffusion models as dmin sees them, one file a family.

The families import diffusers, which is slow: import them from their own modules.
"""

from dmin.models.base import READOUTS, Condition, DiffusionModel, Prediction
from dmin.models.remarks import leave_out_remarks

leave_out_remarks()

__all__ = ["READOUTS", "Condition", "DiffusionModel", "Prediction"]
