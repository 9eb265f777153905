"""Checks before collecting: are the gradients of this model right, and what will it cost?"""

from dmin.collect.prediction import Cost
from dmin.doctor.diagnosis import Check, Covered, Diagnosis
from dmin.doctor.examine import diagnose

__all__ = ["Check", "Cost", "Covered", "Diagnosis", "diagnose"]
